-- ARGV: stream, sequence, limit. Returns {sequence of the last entry, fields of complete groups, {field, reason, …} of
-- cancelled ones} of at most `limit` groups that were closed after the sequence. `more`, the fourth, is 1 if there are
-- more. Read-only.
local after, limit = ARGV[2], tonumber(ARGV[3])
local found = redis.call('ZRANGEBYSCORE', CLOSED, '(' .. after, '+inf', 'WITHSCORES', 'LIMIT', 0, limit)
local complete, cancelled = {}, {}
for i = 1, #found, 2 do
  local group = found[i]
  if stream_of(group) == ARGV[1] then
    local reason = redis.call('HGET', REASONS, group)
    if reason then
      cancelled[#cancelled + 1] = group
      cancelled[#cancelled + 1] = reason
    else
      complete[#complete + 1] = group
    end
  end
end
return { found[#found] or after, complete, cancelled, #found == 2 * limit and 1 or 0 }
