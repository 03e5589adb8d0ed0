-- ARGV: token and beats of the owner that was seen (empty: none), a unique id, lineage, record. Returns the new owner's
-- token; nil if the owner has changed since it was seen. Ends the leases of the previous owner's actors, which can
-- settle no ticket any more, and the turn on its card; removes its weights, which no process can send any more. On a
-- retry the owner already is this one: its token ends with the unique id.
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
redis.call('DEL', ACTORS, ACTOR_DEADLINES, ACTOR_HEARD, WEIGHTS_ANNOUNCED, WEIGHTS_WISHES, WEIGHTS_ROUND, CARD)
return mine
