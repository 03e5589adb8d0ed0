-- ARGV: group field. Returns, by member, the encoded trajectory, nil if the member was given up, or '' if it is
-- missing; an empty list if the group is not complete.
local group = ARGV[1]
if not redis.call('ZSCORE', COMPLETE, group) then
  return {}
end
local tickets = tickets_of(group, size_of(group))
if #tickets == 0 then
  return { '' }
end
local documents = redis.call('HMGET', TRAJECTORIES, unpack(tickets))
for member, ticket in ipairs(tickets) do
  if not documents[member] and redis.call('HEXISTS', GIVEN_UP, ticket) == 0 then
    documents[member] = ''
  end
end
return documents
