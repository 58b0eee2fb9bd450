-- Some of the keys that are there.
-- ARGV: where to go on, a pattern, about how many to look at.
-- Answer: where to go on (0: nowhere), and the keys.

return redis.call('SCAN', ARGV[1], 'MATCH', ARGV[2], 'COUNT', ARGV[3])
