-- ARGV: id of the call, JSON, cap on records. A retry after a lost reply carries the same id and adds nothing.
for _, entry in ipairs(redis.call('XREVRANGE', METRICS, '+', '-', 'COUNT', 16)) do
  if entry[2][2] == ARGV[1] then
    return
  end
end
redis.call('XADD', METRICS, 'MAXLEN', '~', ARGV[3], '*', 'call', ARGV[1], 'json', ARGV[2])
