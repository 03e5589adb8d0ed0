-- ARGV: actor, JSON, time to live in ms. Also removes actors whose heartbeat has expired. Returns the run's state.
local now = now_ms()
for _, actor in ipairs(redis.call('ZRANGEBYSCORE', ACTOR_DEADLINES, '-inf', now)) do
  redis.call('HDEL', ACTORS, actor)
  redis.call('HDEL', ACTOR_HEARD, actor)
  redis.call('ZREM', ACTOR_DEADLINES, actor)
end
redis.call('HSET', ACTORS, ARGV[1], ARGV[2])
redis.call('HSET', ACTOR_HEARD, ARGV[1], string.format('%d', now))
redis.call('ZADD', ACTOR_DEADLINES, now + tonumber(ARGV[3]), ARGV[1])
return redis.call('GET', STATE) or ''
