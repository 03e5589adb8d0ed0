-- ARGV: max attempts, fewest members, limit. Returns the number of expired leases, at most `limit`: the dead actors of a
-- large run hold so many that requeuing all of them would keep every other client waiting.
local expired = 0
for _, ticket in ipairs(redis.call('ZRANGEBYSCORE', LEASES, '-inf', now_ms(), 'LIMIT', 0, tonumber(ARGV[3]))) do
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
