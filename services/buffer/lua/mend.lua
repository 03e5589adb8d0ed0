-- Removes every inconsistent open group, so that it is issued again, and every entry that belongs to no group. Returns
-- the fields of the removed groups. For data that a damaged disk has changed: no script leaves such a group behind.
--
-- Example: a group of 3 whose ticket 2 was lost (x: an entry)
--   member   TICKETS  QUEUE  LEASES+HOLDERS  TRAJECTORIES  GIVEN_UP
--   0        x                               x                        stored: one place
--   1        x        x                                               queued: one place
--   2        x                                                        in no place: nobody would ever play it
-- The group is removed, then everything that its tickets have left in the other keys, then BYTES is counted again.
local function has(hash, ticket)
  return redis.call('HEXISTS', hash, ticket) == 1
end

local function is_in(set, ticket)
  return redis.call('ZSCORE', set, ticket) and true or false
end

-- Whether the ticket's JSON is that of this ticket.
local function has_own_json(ticket, size)
  local json = redis.call('HGET', TICKETS, ticket)
  local read = json and cjson.decode(json)
  return read and read.group_size == size
    and read.stream .. string.format('/%d/%d', read.group, read.member) == ticket_id(ticket)
end

-- Whether each ticket of the open group is in exactly one place, and at least one is not settled yet.
local function is_consistent(group)
  local size, stored, given_up = size_of(group), 0, 0
  for _, ticket in ipairs(tickets_of(group, size)) do
    local leased, kept, given = is_in(LEASES, ticket), has(TRAJECTORIES, ticket), has(GIVEN_UP, ticket)
    local places = 0
    for _, place in ipairs({ is_in(QUEUE, ticket), leased, kept, given }) do
      places = places + (place and 1 or 0)
    end
    local known = given and not has(TICKETS, ticket) or not given and has_own_json(ticket, size)
    if places ~= 1 or leased ~= has(HOLDERS, ticket) or not known then
      return false
    end
    stored = stored + (kept and 1 or 0)
    given_up = given_up + (given and 1 or 0)
  end
  return stored + given_up < size and tonumber(redis.call('HGET', COUNTS, group) or 0) == stored
end

local function keep(key, read, drop, belongs)
  for _, field in ipairs(redis.call(unpack(read))) do
    if not belongs(field) then
      redis.call(drop, key, field)
    end
  end
end

local function keep_fields(hash, belongs)
  keep(hash, { 'HKEYS', hash }, 'HDEL', belongs)
end

local function keep_members(set, belongs)
  keep(set, { 'ZRANGE', set, 0, -1 }, 'ZREM', belongs)
end

local removed = {}
for _, group in ipairs(redis.call('HKEYS', SIZES)) do
  if not is_closed(group) and not is_consistent(group) then
    redis.call('HDEL', SIZES, group)
    removed[#removed + 1] = group
  end
end

local function is_known(group)
  return size_of(group) > 0
end
local function is_open(group)
  return is_known(group) and not is_closed(group)
end
local function is_member(ticket)
  return tonumber(string.sub(ticket, -6)) < size_of(group_of(ticket))
end
local function is_out(ticket)
  return has(TICKETS, ticket)
end

keep_fields(REASONS, is_known)
keep_members(COMPLETE, is_known)
keep_members(CLOSED, is_known)
keep_fields(COUNTS, is_open)
keep_fields(TRAJECTORIES, is_member)
keep_fields(GIVEN_UP, is_member)
keep_fields(TICKETS, function(ticket)
  return is_member(ticket) and not is_closed(group_of(ticket))
end)
keep_fields(HOLDERS, is_out)
keep_fields(ATTEMPTS, is_out)
keep_members(QUEUE, is_out)
keep_members(LEASES, is_out)

-- What the scripts count and list as they go, from the groups themselves.
local right, newest = {}, ''
for _, group in ipairs(redis.call('HKEYS', SIZES)) do
  local complete, cancelled = redis.call('ZSCORE', COMPLETE, group), has(REASONS, group)
  for state, holds in pairs({ known = true, complete = complete, cancelled = cancelled }) do
    local field = stream_of(group) .. ' ' .. state
    right[field] = holds and (right[field] or 0) + 1 or right[field]
  end
  if not complete and not cancelled then
    redis.call('ZREM', CLOSED, group)
  elseif not redis.call('ZSCORE', CLOSED, group) then
    announce(group)
  end
end
for _, group in ipairs(redis.call('HKEYS', COUNTS)) do
  newest = is_training(group) and group > newest and group or newest
end
note_begun(newest)
keep_fields(GROUP_COUNTS, function(field)
  return right[field] ~= nil
end)
for field, count in pairs(right) do
  if tonumber(redis.call('HGET', GROUP_COUNTS, field) or 0) ~= count then
    redis.call('HSET', GROUP_COUNTS, field, string.format('%d', count))
  end
end

local bytes = 0
for _, ticket in ipairs(redis.call('HKEYS', TRAJECTORIES)) do
  bytes = bytes + redis.call('HSTRLEN', TRAJECTORIES, ticket)
end
redis.call('SET', BYTES, string.format('%d', bytes))
return removed
