-- ARGV: token and beats of the owner that was seen (empty: none), a unique id, lineage, record. Answers the new owner's
-- token; nothing when the owner is no longer the one that was seen. The tickets of the owner before are free again: its
-- actors can settle none of them any more. Its weights are gone, too: nobody can send them, or waits for them.
local token, beats = owner_has('token') or '', owner_has('beats') or ''
if string.match(token, '%-(.*)$') == ARGV[3] then
  return token
end
if token ~= ARGV[1] or beats ~= ARGV[2] then
  return false
end
local number = math.max(number_of(token) + 1, redis_ms())
local mine = string.format('%d-%s', number, ARGV[3])
install_owner(mine, ARGV[4], ARGV[5])
for _, ticket in ipairs(redis.call('ZRANGE', LEASES, 0, -1)) do
  if end_lease(ticket) then
    redis.call('ZADD', QUEUE, 0, ticket)
  end
end
redis.call('DEL', ACTORS, ACTOR_DEADLINES, ACTOR_HEARD, WEIGHTS_ANNOUNCED, WEIGHTS_WISHES, WEIGHTS_ROUND)
return mine
