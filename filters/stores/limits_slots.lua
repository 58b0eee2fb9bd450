-- What a process says of the slots that it holds.
-- KEYS: slots. ARGV: now_us or 0, process, lease_us, and of each slot:
--       "-": one less;  "~": as many as before;  a number: so many. The lease is renewed.
local now = now_us(ARGV[1])
local replica, lease = ARGV[2], tonumber(ARGV[3])
for index, key in ipairs(KEYS) do
  local said = ARGV[3 + index]
  local count = slot_of(redis.call('HGET', key, replica))
  if said == '-' then
    count = count - 1
  elseif said ~= '~' then
    count = tonumber(said)
  end
  put_slot(key, replica, count, now, lease)
end
return 0
