-- The number of the last purge. Marks that were lost begin with the time, beyond all numbers before:
-- what was put until then is gone with them (cache_get.lua).
-- KEYS[2]: the marks.

local function serial()
  local last = redis.call('HGET', KEYS[2], 'serial')
  if last then
    return last
  end
  local time = redis.call('TIME')
  last = string.format('%.0f', tonumber(time[1]) * 1000000 + tonumber(time[2]))
  redis.call('HSET', KEYS[2], 'serial', last, 'all', last)
  return last
end
