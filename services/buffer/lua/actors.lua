-- Answers actor, JSON, actor, JSON … of the heartbeats that have not expired.
local alive = {}
for _, actor in ipairs(redis.call('ZRANGEBYSCORE', ACTOR_DEADLINES, '(' .. string.format('%d', now_ms()), '+inf')) do
  alive[#alive + 1] = actor
  alive[#alive + 1] = redis.call('HGET', ACTORS, actor)
end
return alive
