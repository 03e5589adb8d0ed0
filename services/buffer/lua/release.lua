-- ARGV: actor, ticket fields. Tickets of other holders are left alone.
for i = 2, #ARGV do
  if redis.call('HGET', HOLDERS, ARGV[i]) == ARGV[1] then
    end_lease(ARGV[i])
    redis.call('ZADD', QUEUE, 0, ARGV[i])
  end
end
