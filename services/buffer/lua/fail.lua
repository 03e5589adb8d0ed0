-- ARGV: actor, ticket field, reason, max attempts, fewest members. Returns 1 if the ticket's group is cancelled.
-- Only the holder's failure counts, and it ends the lease: so a retry counts once.
local actor, ticket, reason = ARGV[1], ARGV[2], ARGV[3]
if redis.call('HGET', HOLDERS, ticket) == actor then
  count_attempt(ticket, reason, tonumber(ARGV[4]), tonumber(ARGV[5]))
end
return redis.call('HEXISTS', REASONS, group_of(ticket))
