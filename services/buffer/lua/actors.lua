-- Returns {actor, JSON, age in ms, actor, JSON, age in ms, …} of the heartbeats that have not expired.
local now = now_ms()
local alive = {}
for _, actor in ipairs(redis.call('ZRANGEBYSCORE', ACTOR_DEADLINES, '(' .. string.format('%d', now), '+inf')) do
  alive[#alive + 1] = actor
  alive[#alive + 1] = redis.call('HGET', ACTORS, actor) or ''
  alive[#alive + 1] = math.max(0, now - tonumber(redis.call('HGET', ACTOR_HEARD, actor) or now))
end
return alive
