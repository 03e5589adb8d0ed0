-- ARGV: the round, JSON.
redis.call('SET', WEIGHTS_ROUND, ARGV[1])
