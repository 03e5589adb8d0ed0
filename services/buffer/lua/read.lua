-- ARGV: group field. Answers the encoded trajectories in member order; nothing when the group is not complete.
local group = ARGV[1]
if not redis.call('ZSCORE', COMPLETE, group) then
  return {}
end
return redis.call('HMGET', TRAJECTORIES, unpack(tickets_of(group, tonumber(redis.call('HGET', SIZES, group)))))
