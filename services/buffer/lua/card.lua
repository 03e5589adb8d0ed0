-- Returns {holder, phase, ms until the end of its lease, 1 if another one waits for it}; nil if the card is free.
local now = now_ms()
local _, ends = card_state()
if ends <= now then
  return false
end
local kept = redis.call('HMGET', CARD, 'holder', 'phase', 'wanted')
return { kept[1] or '', kept[2] or '', ends - now, (clock_ms(kept[3]) or 0) > now and 1 or 0 }
