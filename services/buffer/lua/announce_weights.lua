-- ARGV: the announcement of a policy version, JSON; empty: there is none.
if ARGV[1] == '' then
  redis.call('DEL', WEIGHTS_ANNOUNCED)
else
  redis.call('SET', WEIGHTS_ANNOUNCED, ARGV[1])
end
