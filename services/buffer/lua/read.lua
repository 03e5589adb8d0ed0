-- ARGV: group field. Answers the encoded trajectories in member order, without members that were given up; nothing when
-- the group is not complete.
local group = ARGV[1]
if not redis.call('ZSCORE', COMPLETE, group) then
  return {}
end
local tickets = tickets_of(group, tonumber(redis.call('HGET', SIZES, group)))
local documents = {}
for _, document in ipairs(redis.call('HMGET', TRAJECTORIES, unpack(tickets))) do
  documents[#documents + 1] = document or nil
end
return documents
