-- ARGV: actor, lease in ms, ticket fields. Returns the positions (from 0) of tickets that the actor no longer holds.
local deadline = now_ms() + tonumber(ARGV[2])
local lost = {}
for i = 3, #ARGV do
  if redis.call('HGET', HOLDERS, ARGV[i]) == ARGV[1] then
    redis.call('ZADD', LEASES, 'XX', deadline, ARGV[i])
  else
    lost[#lost + 1] = i - 3
  end
end
return lost
