-- ARGV: id, JSON, cap on waiting commands, cap on kept commands. Returns 0 if too many wait already, else 1.
if redis.call('HEXISTS', COMMANDS, ARGV[1]) == 1 then
  return 1
end
if redis.call('HLEN', COMMANDS) - redis.call('HLEN', ANSWERS) >= tonumber(ARGV[3]) then
  return 0
end
redis.call('HSET', COMMANDS, ARGV[1], ARGV[2])
redis.call('RPUSH', COMMAND_ORDER, ARGV[1])
for _, id in ipairs(redis.call('LRANGE', COMMAND_ORDER, 0, -1)) do
  if redis.call('HLEN', COMMANDS) <= tonumber(ARGV[4]) then
    break
  end
  if redis.call('HDEL', ANSWERS, id) == 1 then
    redis.call('HDEL', COMMANDS, id)
    redis.call('LREM', COMMAND_ORDER, 1, id)
  end
end
return 1
