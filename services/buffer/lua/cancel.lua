-- ARGV: group field, reason. No-op for unknown and cancelled groups.
cancel_group(ARGV[1], ARGV[2])
