-- Shared by every script; the key names above it come from keys.py.
-- Fields: group = '<0|1> <stream> <12 digits>', ticket = group .. ' <6 digits>'.

local function now_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

local function group_of(ticket)
  return string.sub(ticket, 1, -8)
end

local function stream_of(group)
  return string.sub(group, 3, -14)
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
  local sequence = math.max(tonumber(redis.call('GET', SEQUENCE) or 0) + 1, now_ms())
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
  local size = tonumber(redis.call('HGET', SIZES, group))
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
  local size = tonumber(redis.call('HGET', SIZES, group) or 0)
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
  if fewest == 0 or members_left(group, tonumber(redis.call('HGET', SIZES, group))) <= fewest then
    cancel_group(group, why)
    return
  end
  redis.call('HDEL', TICKETS, ticket)
  redis.call('HDEL', ATTEMPTS, ticket)
  redis.call('HSET', GIVEN_UP, ticket, why)
  complete_if_full(group)
end
