-- Shared by the scripts that install an owner; it names, and so declares, every key of the run.

-- Deletes all keys of the run except its owner: nobody may train on the data of another lineage.
local function wipe()
  redis.call('UNLINK', QUEUE, LEASES, HOLDERS, TICKETS, ATTEMPTS, GIVEN_UP, TRAJECTORIES, BYTES, SIZES, COUNTS, BEGUN,
    COMPLETE, REASONS, CLOSED, GROUP_COUNTS, SEQUENCE, CHANGED, ACTORS, ACTOR_DEADLINES, ACTOR_HEARD, MANIFEST, STATE,
    METRICS, COMMANDS, COMMAND_ORDER, ANSWERS, DESIRED_ACTORS, WEIGHTS_ANNOUNCED, WEIGHTS_WISHES, WEIGHTS_ROUND, CARD,
    CLOCK)
end

-- Makes this process the owner. Data of the same lineage stay, those of another are deleted.
local function install_owner(token, lineage, record)
  if owner_has('lineage') ~= lineage then
    wipe()
  end
  redis.call('DEL', OWNER)
  redis.call('HSET', OWNER, 'token', token, 'lineage', lineage, 'record', record, 'beats', 0)
end

