-- ARGV: actor, ticket fields. Skips tickets of other holders.
for i = 2, #ARGV do
  if redis.call('HGET', HOLDERS, ARGV[i]) == ARGV[1] then
    end_lease(ARGV[i])
    redis.call('ZADD', QUEUE, 0, ARGV[i])
  end
end
