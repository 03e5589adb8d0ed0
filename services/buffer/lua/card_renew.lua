-- ARGV: number of the turn, holder, id of its request, lease in ms, phase. Returns 1 if the turn goes on, 2 if it does
-- and another one waits for the card, 0 if it is over: a later turn has begun. An earlier number means that Redis has
-- lost data: the caller's turn is written again.
local now, mine = now_ms(), tonumber(ARGV[1])
if card_state() > mine then
  return 0
end
set_card(mine, ARGV[2], ARGV[3], now + tonumber(ARGV[4]), ARGV[5])
return (clock_ms(redis.call('HGET', CARD, 'wanted')) or 0) > now and 2 or 1
