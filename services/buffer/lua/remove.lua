-- ARGV: stream, its group fields. A stream's last group takes the stream's other entries with it.
for i = 2, #ARGV do
  clear(ARGV[i])
  redis.call('HDEL', SIZES, ARGV[i])
  redis.call('HDEL', REASONS, ARGV[i])
end
for _, group in ipairs(redis.call('HKEYS', SIZES)) do
  if stream_of(group) == ARGV[1] then
    return
  end
end
redis.call('HDEL', CHANGED, ARGV[1])
