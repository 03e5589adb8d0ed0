-- Counts a heartbeat of the owner. Callers that are not the owner have an empty fence and count nothing.
if fence ~= '' then
  redis.call('HINCRBY', OWNER, 'beats', 1)
end
