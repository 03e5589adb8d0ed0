-- Returns {queued, leased, stored bytes, fields of all groups, of the complete ones, of the cancelled ones}.
return {
  redis.call('ZCARD', QUEUE),
  redis.call('ZCARD', LEASES),
  stored_bytes(),
  redis.call('HKEYS', SIZES),
  redis.call('ZRANGE', COMPLETE, 0, -1),
  redis.call('HKEYS', REASONS),
}
