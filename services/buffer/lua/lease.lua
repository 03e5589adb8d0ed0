-- ARGV: actor, limit, lease in ms, cap in bytes. Returns the JSON of the leased tickets.
--
-- Below the cap: the first tickets of the queue, which is sorted in the order of play. Above the cap the stored bytes
-- must not grow without bound, but everything that the learner may be waiting for must still be played.
--
-- Example, above the cap, with limit 4. Groups 5 and 7 are complete, so `last` is training group 7:
--   queue                      begun?   leased?
--   0 eval-000040 …00 000003   no       yes   evaluation: the learner may wait for it
--   1 train …0006 000000       no       yes   overtaken: 7 is complete, and the learner takes 6 first
--   1 train …0008 000002       yes      yes   begun: its stored members are freed only when it completes
--   1 train …0009 000000       no       no    new: it would add to the stored bytes
local actor, limit, cap = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[4])
local deadline = now_ms() + tonumber(ARGV[3])
local full = stored_bytes() > cap
local last = redis.call('ZRANGE', COMPLETE, -1, -1)[1]

-- Whether tickets of the group may be leased above the cap. COUNTS has an entry from the group's first lease on; fields
-- of evaluation groups begin with 0; a group sorts before `last` if it was issued again, since it was lost or too old.
local function is_awaited(group)
  return redis.call('HEXISTS', COUNTS, group) == 1 or string.sub(group, 1, 1) == '0' or (last and group < last)
end

local granted = {}
for _, ticket in ipairs(redis.call('ZRANGE', QUEUE, 0, full and -1 or limit - 1)) do
  if #granted == limit then
    break
  end
  local group = group_of(ticket)
  if not full or is_awaited(group) then
    redis.call('ZREM', QUEUE, ticket)
    redis.call('ZADD', LEASES, deadline, ticket)
    redis.call('HSET', HOLDERS, ticket, actor)
    redis.call('HSETNX', COUNTS, group, 0)
    granted[#granted + 1] = redis.call('HGET', TICKETS, ticket)
  end
end
return granted
