-- ARGV: holder, id of its request, lease in ms, '1' if the holder goes first. Returns the number of its turn; nil while
-- another one has the card. Who goes first and has to wait leaves a mark for as long as its lease: until then only it
-- gets the card. On a retry after a lost reply the request has the card already.
--
-- Example, leases of 30 s:
--   0 s   take actor a             turn 17
--   5 s   take learner b, first    nil, marked until 35 s
--   6 s   renew turn 17            wanted
--   7 s   give turn 17
--   8 s   take actor c             nil: the learner goes first
--   9 s   take learner b, first    turn 19; had the actor died at 2 s, it would be 30 s
local now, lease = now_ms(), tonumber(ARGV[3])
local number, ends, id = card_state()
if ends > now and id == ARGV[2] then
  return number
end
local wanted = clock_ms(redis.call('HGET', CARD, 'wanted')) or 0
if ends > now or (ARGV[4] ~= '1' and wanted > now) then
  if ARGV[4] == '1' then
    redis.call('HSET', CARD, 'wanted', string.format('%d', now + lease))
  end
  return false
end
number = math.max(number + 1, redis_ms())
set_card(number, ARGV[1], ARGV[2], now + lease, '')
redis.call('HDEL', CARD, 'wanted')
return number
