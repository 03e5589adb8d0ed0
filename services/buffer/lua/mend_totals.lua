-- Counts and lists again what the scripts keep as they go, from the groups themselves; after `mend`.
local right, newest = {}, ''
for _, group in ipairs(redis.call('HKEYS', SIZES)) do
  local complete, cancelled = redis.call('ZSCORE', COMPLETE, group), redis.call('HEXISTS', REASONS, group) == 1
  for state, holds in pairs({ known = true, complete = complete, cancelled = cancelled }) do
    local field = stream_of(group) .. ' ' .. state
    right[field] = holds and (right[field] or 0) + 1 or right[field]
  end
  if not complete and not cancelled then
    redis.call('ZREM', CLOSED, group)
  elseif not redis.call('ZSCORE', CLOSED, group) then
    announce(group)
  end
end
for _, group in ipairs(redis.call('HKEYS', COUNTS)) do
  newest = is_training(group) and group > newest and group or newest
end
note_begun(newest)
for _, field in ipairs(redis.call('HKEYS', GROUP_COUNTS)) do
  if right[field] == nil then
    redis.call('HDEL', GROUP_COUNTS, field)
  end
end
for field, count in pairs(right) do
  if tonumber(redis.call('HGET', GROUP_COUNTS, field) or 0) ~= count then
    redis.call('HSET', GROUP_COUNTS, field, string.format('%d', count))
  end
end

local bytes = 0
for _, ticket in ipairs(redis.call('HKEYS', TRAJECTORIES)) do
  bytes = bytes + redis.call('HSTRLEN', TRAJECTORIES, ticket)
end
redis.call('SET', BYTES, string.format('%d', bytes))
