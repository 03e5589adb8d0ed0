-- ARGV: group field. Answers, member by member, the encoded trajectory, nil where the member was given up, and an empty
-- string where it is missing; nothing when the group is not complete.
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
