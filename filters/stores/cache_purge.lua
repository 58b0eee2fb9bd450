-- Forget recorded answers. After cache_marks.lua.
-- KEYS: the entry, the marks.
-- ARGV: the name of a mark; then, to forget the one entry if it is there and is that mark's (of any:
-- all), 1.
-- Answer: how many are forgotten; -1: all that have the mark, however many.

if not ARGV[2] then
  serial()
  redis.call('HSET', KEYS[2], ARGV[1], redis.call('HINCRBY', KEYS[2], 'serial', 1))
  return -1
end
local kept = redis.call('HMGET', KEYS[1], 'team', 'model', 'both')
if ARGV[1] ~= 'all' and ARGV[1] ~= kept[1] and ARGV[1] ~= kept[2] and ARGV[1] ~= kept[3] then
  return 0
end
return redis.call('UNLINK', KEYS[1])
