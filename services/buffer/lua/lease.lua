-- ARGV: actor, limit, lease in ms, cap in bytes. Returns the JSON of the leased tickets.
--
-- Below the cap: the first tickets of the queue, which is sorted in the order of play. Above the cap the stored bytes
-- must not grow without bound, but everything that the learner may be waiting for must still be played.
--
-- Example, above the cap, with limit 4. Groups 5 and 7 are complete, so `last` is training group 7; the newest group
-- that has begun is 8, so the search ends there, however many tickets follow:
--   queue                      begun?   leased?
--   0 eval-000040 …00 000003   no       yes   evaluation: the learner may wait for it
--   1 train …0006 000000       no       yes   overtaken: 7 is complete, and the learner takes 6 first
--   1 train …0008 000002       yes      yes   begun: its stored members are freed only when it completes
--   1 train …0009 000000       no       no    new: it would add to the stored bytes
local actor, limit, cap = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[4])
local deadline = now_ms() + tonumber(ARGV[3])
local last = redis.call('ZRANGE', COMPLETE, -1, -1)[1]
local begun = newest_begun()
local newest = begun

-- Whether tickets of the group may be leased above the cap. COUNTS has an entry from the group's first lease on; a group
-- sorts before `last` if it was issued again, since it was lost or too old.
local function is_awaited(group)
  return not is_training(group) or redis.call('HEXISTS', COUNTS, group) == 1 or (last and group < last)
end

-- Up to so many tickets of the queue after `from`: up to `to`, the last that may be leased above the cap.
local function tickets_after(from, to)
  return redis.call('ZRANGEBYLEX', QUEUE, from, to, 'LIMIT', 0, limit)
end

local function search_end()
  local final = last and is_training(last) and last > begun and last or begun
  return final == '' and '(1' or '(' .. final .. ' ~'
end

local granted = {}

local function grant(ticket, group)
  redis.call('ZREM', QUEUE, ticket)
  redis.call('ZADD', LEASES, deadline, ticket)
  redis.call('HSET', HOLDERS, ticket, actor)
  redis.call('HSETNX', COUNTS, group, 0)
  if is_training(group) and group > newest then
    newest = group
  end
  granted[#granted + 1] = redis.call('HGET', TICKETS, ticket)
end

local full = stored_bytes() > cap
local from, to = '-', full and search_end() or '+'
repeat
  local found = tickets_after(from, to)
  for _, ticket in ipairs(found) do
    local group = group_of(ticket)
    if #granted < limit and (not full or is_awaited(group)) then
      grant(ticket, group)
    end
    from = '(' .. ticket
  end
until #found < limit or #granted == limit
note_begun(newest)
return granted
