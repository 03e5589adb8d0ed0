-- ARGV: ticket field, encoded trajectory. First write wins. Returns a name of `Stored`.
local ticket, data = ARGV[1], ARGV[2]
local group = group_of(ticket)
if redis.call('HEXISTS', TICKETS, ticket) == 0 then
  return redis.call('HEXISTS', TRAJECTORIES, ticket) == 1 and 'DUPLICATE' or 'UNKNOWN'
end
if redis.call('HSETNX', TRAJECTORIES, ticket, data) == 0 then
  return 'DUPLICATE'
end
if not end_lease(ticket) then
  redis.call('ZREM', QUEUE, ticket)
  note_begun(group)
end
redis.call('HDEL', ATTEMPTS, ticket)
redis.call('INCRBY', BYTES, #data)
redis.call('HINCRBY', COUNTS, group, 1)
return complete_if_full(group) and 'COMPLETED' or 'STORED'
