-- ARGV: id, JSON. Answers 1 when this is the command's first answer.
if redis.call('HEXISTS', COMMANDS, ARGV[1]) == 0 then
  return 0
end
return redis.call('HSETNX', ANSWERS, ARGV[1], ARGV[2])
