-- ARGV: actor, limit, lease in ms, cap in bytes. Answers the JSON of the granted tickets.
local actor, limit, cap = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[4])
local deadline = now_ms() + tonumber(ARGV[3])
local full = stored_bytes() > cap
local last = redis.call('ZRANGE', COMPLETE, -1, -1)[1]

-- Beyond the cap: groups that an actor has begun, evaluation (the learner may be waiting for it), and a training group
-- that later ones have overtaken, since it was lost or too old (the learner takes groups in order).
local function may_go_on(group)
  return redis.call('HEXISTS', COUNTS, group) == 1 or string.sub(group, 1, 1) == '0' or (last and group < last)
end

local granted = {}
for _, ticket in ipairs(redis.call('ZRANGE', QUEUE, 0, full and -1 or limit - 1)) do
  if #granted == limit then
    break
  end
  local group = group_of(ticket)
  if not full or may_go_on(group) then
    redis.call('ZREM', QUEUE, ticket)
    redis.call('ZADD', LEASES, deadline, ticket)
    redis.call('HSET', HOLDERS, ticket, actor)
    redis.call('HSETNX', COUNTS, group, 0)
    granted[#granted + 1] = redis.call('HGET', TICKETS, ticket)
  end
end
return granted
