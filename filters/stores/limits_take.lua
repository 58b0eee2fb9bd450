-- Takes of all windows and slots, or of none.
-- KEYS: windows, then slots.
-- ARGV: now_us or 0, process, lease_us, how many windows,
--       of each window: limit, period_us, burst or -1, amount;  of each slot: limit
-- Answer: {1, of each window: its bucket's number and first_us}
--      or {0, index, wait_us or -1, remaining}
local now = now_us(ARGV[1])
local replica, lease, count = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])

local asked = {}
local refused, longest, left
for index = 1, count do
  local at = 1 + index * 4
  local ask = {
    limit = tonumber(ARGV[at]),
    burst = tonumber(ARGV[at + 2]),
    amount = tonumber(ARGV[at + 3]),
  }
  ask.window = open_window(KEYS[index], tonumber(ARGV[at + 1]), now)
  asked[index] = ask
  local wait = wait_us(ask.window, now, ask.amount, ask.limit, ask.burst)
  if wait ~= 0 then
    local length = wait < 0 and math.huge or wait
    if refused == nil or length > longest then
      refused, longest = index, length
      left = remaining(ask.window, now, ask.limit, ask.burst)
    end
  end
end

local slots = {}
if refused == nil then
  for index = count + 1, #KEYS do
    local taken, own = 0, 0
    local fields = redis.call('HGETALL', KEYS[index])
    for each = 1, #fields, 2 do
      local held, expires = slot_of(fields[each + 1])
      if fields[each] == replica then
        own = held
        taken = taken + held
      elseif expires > now then
        taken = taken + held
      else
        redis.call('HDEL', KEYS[index], fields[each])
      end
    end
    if taken >= tonumber(ARGV[4 + count * 4 + index - count]) then
      refused, longest, left = index, 0, 0
      break
    end
    slots[index] = own
  end
end

if refused ~= nil then
  for _, ask in ipairs(asked) do
    if ask.window.has_changed then
      save_window(ask.window)
    end
  end
  return {0, refused - 1, longest == math.huge and -1 or longest, left}
end

local answer = {1}
for _, ask in ipairs(asked) do
  local number, first = charge(ask.window, now, ask.amount, ask.limit, ask.burst)
  save_window(ask.window)
  answer[#answer + 1] = number
  answer[#answer + 1] = first
end
for index, own in pairs(slots) do
  put_slot(KEYS[index], replica, own + 1, now, lease)
end
return answer
