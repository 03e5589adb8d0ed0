-- The owner ends. Its token stays, so that what is left of it is not mistaken for the next owner.
redis.call('HSET', OWNER, 'released', 1)
