-- ARGV: actor, limit, lease in ms, cap in bytes. Answers the JSON of the granted tickets.
-- Beyond the cap only groups that an actor has already begun go on: they must be able to finish.
local actor, limit, cap = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[4])
local deadline = now_ms() + tonumber(ARGV[3])
local full = stored_bytes() > cap
local granted = {}
for _, ticket in ipairs(redis.call('ZRANGE', QUEUE, 0, full and -1 or limit - 1)) do
  if #granted == limit then
    break
  end
  local group = group_of(ticket)
  if not full or redis.call('HEXISTS', COUNTS, group) == 1 then
    redis.call('ZREM', QUEUE, ticket)
    redis.call('ZADD', LEASES, deadline, ticket)
    redis.call('HSET', HOLDERS, ticket, actor)
    redis.call('HSETNX', COUNTS, group, 0)
    granted[#granted + 1] = redis.call('HGET', TICKETS, ticket)
  end
end
return granted
