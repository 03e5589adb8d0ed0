-- ARGV: max attempts, fewest members. Returns the number of expired leases.
local expired = 0
for _, ticket in ipairs(redis.call('ZRANGEBYSCORE', LEASES, '-inf', now_ms())) do
  -- An earlier iteration may have cancelled the group, and with it this lease.
  local actor = redis.call('HGET', HOLDERS, ticket)
  if actor then
    count_attempt(ticket, 'lease of ' .. actor .. ' expired', tonumber(ARGV[1]), tonumber(ARGV[2]))
  else
    redis.call('ZREM', LEASES, ticket)
  end
  expired = expired + 1
end
return expired
