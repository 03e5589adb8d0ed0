-- ARGV: state.
redis.call('SET', STATE, ARGV[1])
