-- Returns {command JSON, answer JSON or '', command JSON, …}, oldest first.
local found = {}
for _, id in ipairs(redis.call('LRANGE', COMMAND_ORDER, 0, -1)) do
  found[#found + 1] = redis.call('HGET', COMMANDS, id)
  found[#found + 1] = redis.call('HGET', ANSWERS, id) or ''
end
return found
