-- ARGV: ticket field, encoded trajectory. First write wins.
local ticket, data = ARGV[1], ARGV[2]
local group = group_of(ticket)
if redis.call('HEXISTS', TRAJECTORIES, ticket) == 1 then
  return 'DUPLICATE'
end
if redis.call('HEXISTS', TICKETS, ticket) == 0 then
  return 'UNKNOWN'
end
redis.call('ZREM', QUEUE, ticket)
end_lease(ticket)
redis.call('HDEL', ATTEMPTS, ticket)
redis.call('HSET', TRAJECTORIES, ticket, data)
redis.call('INCRBY', BYTES, #data)
local stored = redis.call('HINCRBY', COUNTS, group, 1)
local size = tonumber(redis.call('HGET', SIZES, group))
if stored < size then
  return 'STORED'
end
for member = 0, size - 1 do
  redis.call('HDEL', TICKETS, ticket_of(group, member))
end
redis.call('HDEL', COUNTS, group)
redis.call('ZADD', COMPLETE, 0, group)
announce(group)
return 'COMPLETED'
