-- Marks the owner as released. Its token stays, so that late calls of its actors are told from those of the next owner.
redis.call('HSET', OWNER, 'released', 1)
