-- Returns the time (ms) and, as flat lists: sizes, complete groups, reasons, waiting tickets, holders, ends of leases
-- (ms), sizes of trajectories (bytes), failed attempts. Read-only.
local stored = {}
for _, ticket in ipairs(redis.call('HKEYS', TRAJECTORIES)) do
  stored[#stored + 1] = ticket
  stored[#stored + 1] = tostring(redis.call('HSTRLEN', TRAJECTORIES, ticket))
end
return {
  now_ms(),
  redis.call('HGETALL', SIZES),
  redis.call('ZRANGE', COMPLETE, 0, -1),
  redis.call('HGETALL', REASONS),
  redis.call('ZRANGE', QUEUE, 0, -1),
  redis.call('HGETALL', HOLDERS),
  redis.call('ZRANGE', LEASES, 0, -1, 'WITHSCORES'),
  stored,
  redis.call('HGETALL', ATTEMPTS),
}
