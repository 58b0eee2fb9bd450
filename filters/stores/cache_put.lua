-- Keep a recorded answer. After cache_marks.lua.
-- KEYS: the entry (a hash), the marks (a hash).
-- ARGV: for how many milliseconds; the names of its marks: team, model, both; its bytes.

redis.call('HSET', KEYS[1], 'born', serial(), 'team', ARGV[2], 'model', ARGV[3], 'both', ARGV[4],
  'data', ARGV[5])
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return 1
