-- ARGV: stream, its group fields. A stream's last group takes the stream's other entries with it.
for i = 2, #ARGV do
  local group = ARGV[i]
  clear(group)
  if redis.call('HDEL', SIZES, group) == 1 then
    tally(group, 'known', -1)
  end
  if redis.call('HDEL', REASONS, group) == 1 then
    tally(group, 'cancelled', -1)
  end
end
if redis.call('HEXISTS', GROUP_COUNTS, ARGV[1] .. ' known') == 0 then
  redis.call('HDEL', CHANGED, ARGV[1])
  if is_training(ARGV[2]) then
    redis.call('DEL', BEGUN)
  end
end
