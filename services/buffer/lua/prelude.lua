-- Shared by every script; keys.py puts the key names in front of it.
-- Fields: group = '<0|1> <stream> <12 digits>', ticket = group .. ' <6 digits>'.
--
-- State of a group's tickets, one line per member, with the keys that hold it:
--
--   issue      lease      store
--   ────▶ QUEUE ────▶ LEASES ────▶ TRAJECTORIES        the group is COMPLETE once COUNTS, its stored members,
--           ▲           │  HOLDERS                     equals its SIZES less its GIVEN_UP members
--           └───────────┤
--     release, expire,  │ too many attempts
--     fail              ▼
--                    GIVEN_UP, or the whole group is cancelled (REASONS)

-- The last argument of every call is the caller's token, empty for readers and for those who request something of the
-- run. Tokens of later owners of a run begin with higher numbers.
local fence = table.remove(ARGV)

local function number_of(token)
  return tonumber(string.match(token, '^%d+')) or 0
end

local function owner_has(field)
  return redis.call('HGET', OWNER, field)
end

if fence ~= '' then
  local token = owner_has('token')
  if token ~= fence then
    -- No token, or an earlier one: Redis has lost data. The caller restores the owner and retries.
    local taken = token and number_of(token) >= number_of(fence)
    return redis.error_reply(taken and 'TAKEN by another owner' or 'FORGOTTEN owner')
  end
end

local function redis_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

-- The run's own clock, in ms: it never goes back, and follows the clock of Redis unless that is set. Leases run on it,
-- so that setting the server's clock neither ends them all nor prolongs them. The processes of a run read it several
-- times a second. While Redis refuses the write (it is full), the clock stands still.
--
-- Example: time of Redis -> the run's time
--   1000 -> 1000
--   1050 -> 1050        less than a tick later: nothing is written
--   1200 -> 1200
--   3600000 -> 2200     set forward by an hour: counts as MAX_STEP_MS
--   1300 -> 2300        set back: counts as TICK_MS
local TICK_MS, MAX_STEP_MS = 100, 1000
local LATEST_MS = 1e15

-- A valid time, or nil. A double above LATEST_MS could not represent one millisecond more.
local function clock_ms(text)
  local ms = tonumber(text)
  return ms and ms >= 0 and ms < LATEST_MS and ms or nil
end

local function now_ms()
  local server = redis_ms()
  local kept = redis.call('HMGET', CLOCK, 'server', 'steady')
  local before, steady = clock_ms(kept[1]), clock_ms(kept[2])
  if before and steady then
    local passed = server - before
    if passed >= 0 and passed < TICK_MS then
      return steady + passed
    end
    steady = steady + (passed < 0 and TICK_MS or math.min(passed, MAX_STEP_MS))
  else
    steady = server
  end
  redis.pcall('HSET', CLOCK, 'server', string.format('%d', server), 'steady', string.format('%d', steady))
  return steady
end

local function group_of(ticket)
  return string.sub(ticket, 1, -8)
end

local function stream_of(group)
  return string.sub(group, 3, -14)
end

local function is_training(group)
  return string.sub(group, 1, 1) == '1'
end

-- The last of the training groups of which a ticket has been leased or stored, or ''.
local function newest_begun()
  return redis.call('GET', BEGUN) or ''
end

local function note_begun(group)
  if is_training(group) and group > newest_begun() then
    redis.call('SET', BEGUN, group)
  end
end

local MAX_GROUP_SIZE = 4096

-- Number of the group's members, 0 if it is unknown.
local function size_of(group)
  local text = redis.call('HGET', SIZES, group)
  local size = text and tonumber(text) or 0
  if not size or size ~= math.floor(size) or size < 0 or size > MAX_GROUP_SIZE or (text and size == 0) then
    error('a group has no valid size')
  end
  return size
end

-- Fields of the group's tickets, in member order.
local function tickets_of(group, size)
  local tickets = {}
  for member = 0, size - 1 do
    tickets[member + 1] = group .. string.format(' %06d', member)
  end
  return tickets
end

local function ticket_id(ticket)
  local group = group_of(ticket)
  local numbers = string.format('/%d/%d', tonumber(string.sub(group, -12)), tonumber(string.sub(ticket, -6)))
  return stream_of(group) .. numbers
end

local function stored_bytes()
  return tonumber(redis.call('GET', BYTES) or 0)
end

local function is_closed(group)
  return redis.call('ZSCORE', COMPLETE, group) or redis.call('HEXISTS', REASONS, group) == 1
end

-- Changes the number of the stream's groups that are `known`, `complete` or `cancelled`, so that nobody counts them.
local function tally(group, state, change)
  local field = stream_of(group) .. ' ' .. state
  if redis.call('HINCRBY', GROUP_COUNTS, field, change) == 0 then
    redis.call('HDEL', GROUP_COUNTS, field)
  end
end

-- Lists the group as the last that was closed (completed or cancelled), and wakes a waiting learner. The sequence is at
-- least the time, so that no number comes twice after Redis lost data.
local function announce(group)
  local sequence = math.max(tonumber(redis.call('GET', SEQUENCE) or 0) + 1, redis_ms())
  redis.call('SET', SEQUENCE, string.format('%d', sequence))
  redis.call('HSET', CHANGED, stream_of(group), string.format('%d', sequence))
  redis.call('ZADD', CLOSED, string.format('%d', sequence), group)
end

-- Number of members that the group will have: its size less those given up.
local function members_left(group, size)
  local left = size
  for _, reason in ipairs(redis.call('HMGET', GIVEN_UP, unpack(tickets_of(group, size)))) do
    left = left - (reason and 1 or 0)
  end
  return left
end

-- Completes the group if all members that it will have are stored; whether it did.
local function complete_if_full(group)
  local size, stored = size_of(group), tonumber(redis.call('HGET', COUNTS, group))
  -- The first comparison, which needs none of the group's tickets, decides for nearly every member but the last.
  if stored < size - redis.call('HLEN', GIVEN_UP) or stored < members_left(group, size) then
    return false
  end
  redis.call('HDEL', TICKETS, unpack(tickets_of(group, size)))
  redis.call('HDEL', COUNTS, group)
  redis.call('ZADD', COMPLETE, 0, group)
  tally(group, 'complete', 1)
  announce(group)
  return true
end

-- Ends the ticket's lease; whether there was one.
local function end_lease(ticket)
  return redis.call('ZREM', LEASES, ticket) == 1 and redis.call('HDEL', HOLDERS, ticket) == 1
end

-- Removes everything of a group except its size and its reason.
local function clear(group)
  local size = size_of(group)
  local freed = 0
  for _, ticket in ipairs(tickets_of(group, size)) do
    local stored = redis.call('HSTRLEN', TRAJECTORIES, ticket)
    if stored > 0 then
      freed = freed + stored
      redis.call('HDEL', TRAJECTORIES, ticket)
    elseif not end_lease(ticket) then
      redis.call('ZREM', QUEUE, ticket)
    end
    redis.call('HDEL', TICKETS, ticket)
    redis.call('HDEL', ATTEMPTS, ticket)
    redis.call('HDEL', GIVEN_UP, ticket)
  end
  redis.call('DECRBY', BYTES, freed)
  redis.call('HDEL', COUNTS, group)
  redis.call('ZREM', CLOSED, group)
  if redis.call('ZREM', COMPLETE, group) == 1 then
    tally(group, 'complete', -1)
  end
end

local function cancel_group(group, reason)
  if redis.call('HEXISTS', SIZES, group) == 0 or redis.call('HEXISTS', REASONS, group) == 1 then
    return
  end
  clear(group)
  redis.call('HSET', REASONS, group, reason)
  tally(group, 'cancelled', 1)
  announce(group)
end

-- Counts a failed attempt of a leased ticket and requeues it. After `max_attempts` the ticket is given up if more than
-- `fewest` members are left (0: never); otherwise its group is cancelled.
--
-- Example: max_attempts 3, fewest 6, a group of 8:
--   member 2 fails 3 times: 8 > 6 left, given up, 7 left
--   member 5 fails 3 times: 7 > 6 left, given up, 6 left
--   member 0 fails 3 times: 6 left, the group is cancelled
local function count_attempt(ticket, reason, max_attempts, fewest)
  end_lease(ticket)
  local failed = redis.call('HINCRBY', ATTEMPTS, ticket, 1)
  if failed < max_attempts then
    redis.call('ZADD', QUEUE, 0, ticket)
    return
  end
  local group = group_of(ticket)
  local why = ticket_id(ticket) .. ' failed ' .. failed .. ' times, last: ' .. reason
  if fewest == 0 or members_left(group, size_of(group)) <= fewest then
    cancel_group(group, why)
    return
  end
  redis.call('HDEL', TICKETS, ticket)
  redis.call('HDEL', ATTEMPTS, ticket)
  redis.call('HSET', GIVEN_UP, ticket, why)
  complete_if_full(group)
end
