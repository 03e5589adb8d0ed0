-- ARGV: most attempts, fewest members. Answers the number of leases that had run out.
local expired = 0
for _, ticket in ipairs(redis.call('ZRANGEBYSCORE', LEASES, '-inf', now_ms())) do
  -- An earlier one of this loop may have cancelled the group.
  local actor = redis.call('HGET', HOLDERS, ticket)
  if actor then
    count_attempt(ticket, 'the lease of ' .. actor .. ' ran out', tonumber(ARGV[1]), tonumber(ARGV[2]))
  else
    redis.call('ZREM', LEASES, ticket)
  end
  expired = expired + 1
end
return expired
