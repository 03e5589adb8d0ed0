-- Answers queued, leased, stored bytes, then the fields of all, of the complete and of the cancelled groups.
return {
  redis.call('ZCARD', QUEUE),
  redis.call('ZCARD', LEASES),
  stored_bytes(),
  redis.call('HKEYS', SIZES),
  redis.call('ZRANGE', COMPLETE, 0, -1),
  redis.call('HKEYS', REASONS),
}
