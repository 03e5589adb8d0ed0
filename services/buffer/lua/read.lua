-- ARGV: group field. Answers the encoded trajectories in member order; nothing when the group is not complete.
local group = ARGV[1]
local trajectories = {}
if redis.call('ZSCORE', COMPLETE, group) then
  for member = 0, tonumber(redis.call('HGET', SIZES, group)) - 1 do
    trajectories[member + 1] = redis.call('HGET', TRAJECTORIES, ticket_of(group, member))
  end
end
return trajectories
