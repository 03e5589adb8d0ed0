-- Marks the owner as released. Its token stays, which distinguishes late calls of its actors from the next owner's.
redis.call('HSET', OWNER, 'released', 1)
