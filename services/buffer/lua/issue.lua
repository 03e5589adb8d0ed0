-- ARGV: of each ticket its field, its group's size, its JSON. Returns the number of new tickets; or, if a group is
-- known with another size, {field, size} of the first such group, and changes nothing.
for i = 1, #ARGV, 3 do
  local group = group_of(ARGV[i])
  local size = redis.call('HGET', SIZES, group)
  if size and size ~= ARGV[i + 1] then
    return { group, size }
  end
end
local new = 0
for i = 1, #ARGV, 3 do
  local ticket = ARGV[i]
  local group = group_of(ticket)
  if not is_closed(group) and redis.call('HEXISTS', GIVEN_UP, ticket) == 0
    and redis.call('HSETNX', TICKETS, ticket, ARGV[i + 2]) == 1 then
    if redis.call('HSETNX', SIZES, group, ARGV[i + 1]) == 1 then
      tally(group, 'known', 1)
    end
    redis.call('ZADD', QUEUE, 0, ticket)
    new = new + 1
  end
end
return new
