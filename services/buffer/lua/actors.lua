-- Returns {actors, JSON of each, age of each in ms} of the heartbeats that have not expired.
local CHUNK = 1000  -- Lua passes some 8,000 arguments to a command
local now = now_ms()
local names = redis.call('ZRANGEBYSCORE', ACTOR_DEADLINES, '(' .. string.format('%d', now), '+inf')
local facts, ages = {}, {}
for first = 1, #names, CHUNK do
  local some = { unpack(names, first, math.min(first + CHUNK - 1, #names)) }
  local heard = redis.call('HMGET', ACTOR_HEARD, unpack(some))
  for i, json in ipairs(redis.call('HMGET', ACTORS, unpack(some))) do
    facts[#facts + 1] = json or ''
    ages[#ages + 1] = math.max(0, now - tonumber(heard[i] or now))
  end
end
return { names, facts, ages }
