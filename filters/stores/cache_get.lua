-- A recorded answer, unless it was purged.
-- KEYS: the entry (a hash), the marks (a hash).
-- Answer: its bytes, or nothing.
-- The marks hold a serial number for all entries, and for each team, model and pair of both that was
-- purged: what was put before is not there any more. When the marks themselves are lost, so is all
-- that was put: it may have been purged.

local kept = redis.call('HMGET', KEYS[1], 'data', 'born', 'team', 'model', 'both')
if not kept[1] then
  return false
end
local born = tonumber(kept[2])
local marks = redis.call('HMGET', KEYS[2], 'all', kept[3], kept[4], kept[5])
local is_there = marks[1] and born
for i = 1, 4 do
  if is_there and marks[i] and tonumber(marks[i]) > born then
    is_there = false
  end
end
if not is_there then
  redis.call('UNLINK', KEYS[1])
  return false
end
return kept[1]
