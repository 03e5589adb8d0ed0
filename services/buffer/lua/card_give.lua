-- ARGV: number of the turn. Frees the card, unless a later turn has begun. The number grows, so that a renewal that was
-- under way does not take the card back.
local mine = tonumber(ARGV[1])
if card_state() <= mine then
  set_card(mine + 1, '', '', 0, '')
end
