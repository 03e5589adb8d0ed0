-- ARGV: actor, ticket field, reason, most attempts, fewest members. Answers 1 when the ticket's group is cancelled.
-- Only the holder's failure counts: a repeated call counts once.
local actor, ticket, reason = ARGV[1], ARGV[2], ARGV[3]
if redis.call('HGET', HOLDERS, ticket) == actor then
  count_attempt(ticket, reason, tonumber(ARGV[4]), tonumber(ARGV[5]))
end
return redis.call('HEXISTS', REASONS, group_of(ticket))
