-- The owner is alive. Nothing to say for a caller that is not one.
if fence ~= '' then
  redis.call('HINCRBY', OWNER, 'beats', 1)
end
