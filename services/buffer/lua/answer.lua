-- ARGV: id, JSON. Returns 1 if this is the command's first answer, else 0.
if redis.call('HEXISTS', COMMANDS, ARGV[1]) == 0 then
  return 0
end
return redis.call('HSETNX', ANSWERS, ARGV[1], ARGV[2])
