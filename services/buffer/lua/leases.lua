-- ARGV: limit. Returns {time (ms), number of leases, field, holder, end (ms), failed attempts, …} of the leases that end
-- first. Read-only.
local found = redis.call('ZRANGE', LEASES, 0, tonumber(ARGV[1]) - 1, 'WITHSCORES')
local listed = { now_ms(), redis.call('ZCARD', LEASES) }
for i = 1, #found, 2 do
  local holder = redis.call('HGET', HOLDERS, found[i])
  for _, value in ipairs({ found[i], holder or '', found[i + 1], redis.call('HGET', ATTEMPTS, found[i]) or '0' }) do
    listed[#listed + 1] = value
  end
end
return listed
