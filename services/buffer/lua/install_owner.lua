-- Shared by the scripts that make an owner: they name every key of the run.

-- Everything of the run but its owner: what another owner left is nobody's to train on.
local function wipe()
  redis.call('UNLINK', QUEUE, LEASES, HOLDERS, TICKETS, ATTEMPTS, GIVEN_UP, TRAJECTORIES, BYTES, SIZES, COUNTS, COMPLETE,
    REASONS, SEQUENCE, CHANGED, ACTORS, ACTOR_DEADLINES, ACTOR_HEARD, MANIFEST, STATE, METRICS, COMMANDS, COMMAND_ORDER,
    ANSWERS, DESIRED_ACTORS, WEIGHTS_ANNOUNCED, WEIGHTS_WISHES, WEIGHTS_ROUND, CLOCK)
end

-- Data of another lineage go; the same run's stay.
local function install_owner(token, lineage, record)
  if owner_has('lineage') ~= lineage then
    wipe()
  end
  redis.call('DEL', OWNER)
  redis.call('HSET', OWNER, 'token', token, 'lineage', lineage, 'record', record, 'beats', 0)
end

