-- ARGV: group field, reason. Unknown and already cancelled groups stay as they are.
cancel_group(ARGV[1], ARGV[2])
