-- ARGV: JSON.
redis.call('SET', MANIFEST, ARGV[1])
