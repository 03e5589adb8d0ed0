-- Shared by every script; the key names above it come from keys.py.
-- Fields: group = '<0|1> <stream> <12 digits>', ticket = group .. ' <6 digits>'.

-- Every call ends with the caller's token, which is empty for those that only look at a run or ask something of it. The
-- tokens of later owners of a run begin with higher numbers.
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
    -- Without a token, or with an earlier one, Redis has lost data: the caller puts the owner back and calls again.
    local taken = token and number_of(token) >= number_of(fence)
    return redis.error_reply(taken and 'TAKEN by another owner' or 'FORGOTTEN owner')
  end
end

local function redis_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

-- The run's own clock, in ms: it never goes back, and follows that of Redis unless somebody sets it. A step back counts
-- as one tick; a step forward, or a time in which nobody called, counts as MAX_STEP_MS at most. The processes of a run
-- call several times a second. Where Redis refuses the write (it is full), the clock waits.
local TICK_MS, MAX_STEP_MS = 100, 1000
local LATEST_MS = 1e15

-- None of a value that no clock has: adding milliseconds to a larger number would change nothing.
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

local MAX_GROUP_SIZE = 4096

-- Number of the group's members; 0 of an unknown one.
local function size_of(group)
  local text = redis.call('HGET', SIZES, group)
  local size = text and tonumber(text) or 0
  if not size or size ~= math.floor(size) or size < 0 or size > MAX_GROUP_SIZE or (text and size == 0) then
    error('a group has no valid size')
  end
  return size
end

-- Its tickets, member by member.
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

-- At least the time, so that a number is not used twice when Redis has lost its data.
local function announce(group)
  local sequence = math.max(tonumber(redis.call('GET', SEQUENCE) or 0) + 1, redis_ms())
  redis.call('SET', SEQUENCE, string.format('%d', sequence))
  redis.call('HSET', CHANGED, stream_of(group), string.format('%d', sequence))
end

-- How many members the group will have: its size, less those that were given up.
local function members_left(group, size)
  local left = size
  for _, reason in ipairs(redis.call('HMGET', GIVEN_UP, unpack(tickets_of(group, size)))) do
    left = left - (reason and 1 or 0)
  end
  return left
end

-- Makes the group visible when all that it will have is stored (true).
local function complete_if_full(group)
  local size = size_of(group)
  if tonumber(redis.call('HGET', COUNTS, group)) < members_left(group, size) then
    return false
  end
  redis.call('HDEL', TICKETS, unpack(tickets_of(group, size)))
  redis.call('HDEL', COUNTS, group)
  redis.call('ZADD', COMPLETE, 0, group)
  announce(group)
  return true
end

-- True when there was one.
local function end_lease(ticket)
  return redis.call('ZREM', LEASES, ticket) == 1 and redis.call('HDEL', HOLDERS, ticket) == 1
end

-- Drops everything of a group but its size and its reason.
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
  redis.call('ZREM', COMPLETE, group)
end

local function cancel_group(group, reason)
  if redis.call('HEXISTS', SIZES, group) == 0 or redis.call('HEXISTS', REASONS, group) == 1 then
    return
  end
  clear(group)
  redis.call('HSET', REASONS, group, reason)
  announce(group)
end

-- One failed attempt of a leased ticket: back into the queue, or, after too many, the end of its group, unless `fewest`
-- (0: all of them) are left without it.
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
