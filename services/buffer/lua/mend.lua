-- ARGV: a key's name, some of its fields. Of `sizes`: removes the inconsistent ones of these open groups, so that they are
-- issued again, and returns their fields. Of other keys: removes the entries that belong to no group. For data that a
-- damaged disk has changed: no script leaves such a group behind. A run has many tickets, so it is done in parts.
--
-- Example: a group of 3 whose ticket 2 was lost (x: an entry)
--   member   TICKETS  QUEUE  LEASES+HOLDERS  TRAJECTORIES  GIVEN_UP
--   0        x                               x                        stored: one place
--   1        x        x                                               queued: one place
--   2        x                                                        in no place: nobody would ever play it
-- The group is removed, then everything that its tickets have left in the other keys, then `mend_totals` counts again.
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

local function is_known(group)
  return size_of(group) > 0
end
local function is_open(group)
  return is_known(group) and not is_closed(group)
end
local function is_member(ticket)
  return tonumber(string.sub(ticket, -6)) < size_of(group_of(ticket))
end
local function is_open_member(ticket)
  return is_member(ticket) and not is_closed(group_of(ticket))
end
local function is_out(ticket)
  return has(TICKETS, ticket)
end

-- By name: the key, the command that removes an entry, and which entries belong there.
local RULES = {
  sizes = { SIZES, 'HDEL', function(group)
    return is_closed(group) or is_consistent(group)
  end },
  reasons = { REASONS, 'HDEL', is_known },
  complete = { COMPLETE, 'ZREM', is_known },
  closed = { CLOSED, 'ZREM', is_known },
  counts = { COUNTS, 'HDEL', is_open },
  trajectories = { TRAJECTORIES, 'HDEL', is_member },
  given_up = { GIVEN_UP, 'HDEL', is_member },
  tickets = { TICKETS, 'HDEL', is_open_member },
  holders = { HOLDERS, 'HDEL', is_out },
  attempts = { ATTEMPTS, 'HDEL', is_out },
  queue = { QUEUE, 'ZREM', is_out },
  leases = { LEASES, 'ZREM', is_out },
}
local key, drop, belongs = unpack(RULES[table.remove(ARGV, 1)])
local removed = {}
for _, field in ipairs(ARGV) do
  if not belongs(field) then
    redis.call(drop, key, field)
    removed[#removed + 1] = field
  end
end
return removed
