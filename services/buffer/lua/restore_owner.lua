-- ARGV: token, lineage, record. Restores an owner that Redis has lost, unless there is a later one.
local token = owner_has('token')
if not token or number_of(token) < number_of(ARGV[1]) then
  install_owner(ARGV[1], ARGV[2], ARGV[3])
end
