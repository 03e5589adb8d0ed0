-- Returns {queued, leased, stored bytes, {stream and state, number of groups, …}}.
return {
  redis.call('ZCARD', QUEUE),
  redis.call('ZCARD', LEASES),
  stored_bytes(),
  redis.call('HGETALL', GROUP_COUNTS),
}
