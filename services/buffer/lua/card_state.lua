-- Shared by the scripts about the card. What the key holds, invalid values read as those of a free card: number of the
-- last turn, when it ends (ms of the run's clock, 0: the card is free), id of the request that got it.
local function card_state()
  local kept = redis.call('HMGET', CARD, 'number', 'ends', 'id')
  return clock_ms(kept[1]) or 0, clock_ms(kept[2]) or 0, kept[3] or ''
end

local function set_card(number, holder, id, ends, phase)
  redis.call('HSET', CARD, 'number', string.format('%d', number), 'holder', holder, 'id', id, 'ends',
    string.format('%d', ends), 'phase', phase)
end
