-- The windows of filters/algo/window.py and the paces of filters/algo/pace.py, as one hash each.
--   head, tail: numbers of the oldest and the newest bucket; the window is empty when head > tail
--   NUMBER: "first_us last_us amount" of a bucket;  used: their sum
--   level, at: the pace, as in pace.py
-- Times are whole microseconds. Numbers become text by `whole`: Lua's own way keeps 14 digits.

local function whole(number)
  return string.format('%.0f', number)
end

-- The server's time; `given` is for tests, which bring their own.
local function now_us(given)
  if given ~= '0' then
    return tonumber(given)
  end
  local time = redis.call('TIME')
  return time[1] * 1000000 + time[2]
end

local function ceil_div(a, b)
  local quotient = math.floor(a / b)
  if quotient * b < a then
    quotient = quotient + 1
  end
  return quotient
end

local function bucket_of(window, number)
  local text = redis.call('HGET', window.key, number)
  local first, last, amount = string.match(text, '^(%S+) (%S+) (%S+)$')
  return {first = tonumber(first), last = tonumber(last), amount = tonumber(amount)}
end

local function put_bucket(window, number, bucket)
  local text = whole(bucket.first) .. ' ' .. whole(bucket.last) .. ' ' .. whole(bucket.amount)
  redis.call('HSET', window.key, number, text)
end

-- The window under `key` as it is now: buckets that count no more have left.
local function open_window(key, period, now)
  local got = redis.call('HMGET', key, 'head', 'tail', 'used', 'level', 'at')
  local window = {
    key = key,
    period = period,
    head = tonumber(got[1]) or 1,
    tail = tonumber(got[2]) or 0,
    used = tonumber(got[3]) or 0,
    level = tonumber(got[4]) or 0,
    at = tonumber(got[5]) or 0,
  }
  while window.head <= window.tail do
    local bucket = bucket_of(window, window.head)
    -- A clock that was set back by more than a period: what it says of the past means nothing.
    if bucket.last + period > now and bucket.first <= now + period then
      break
    end
    redis.call('HDEL', key, window.head)
    window.used = window.used - bucket.amount
    window.head = window.head + 1
    window.has_changed = true
  end
  if window.head > window.tail then
    window.used = 0  -- numbers beyond 2^53, as of a provider that lies, are not exact
  end
  if window.at > now + period then
    window.level = 0
    window.at = now
  end
  return window
end

local function level_at(window, now, limit)
  local level = math.min(window.level, window.period * limit)
  return math.max(0, level - math.max(0, now - window.at) * limit)
end

local function save_window(window)
  redis.call('HSET', window.key, 'head', whole(window.head), 'tail', whole(window.tail),
    'used', whole(window.used), 'level', whole(window.level), 'at', whole(window.at))
  -- Windows and paces are empty one period after their last charge.
  redis.call('PEXPIRE', window.key, whole(math.ceil(window.period / 500) + 1000))
end

-- How long until `amount` fits; 0: now; -1: never. `burst` -1: there is none.
local function wait_us(window, now, amount, limit, burst)
  local wait = 0
  local over = window.used + amount - limit
  if over > 0 then
    if amount > limit then
      return -1
    end
    for number = window.head, window.tail do
      local bucket = bucket_of(window, number)
      over = over - bucket.amount
      if over <= 0 then
        wait = bucket.last + window.period - now
        break
      end
    end
  end
  if burst >= 0 then
    over = level_at(window, now, limit) + (amount - burst) * window.period
    if over > 0 then
      if amount > burst or limit <= 0 then
        return -1
      end
      wait = math.max(wait, math.max(0, window.at - now) + ceil_div(over, limit))
    end
  end
  return wait
end

-- Counts `amount`, whatever the limit. Answers the bucket's number and first time.
local function charge(window, now, amount, limit, burst)
  if burst >= 0 then
    window.level = level_at(window, now, limit) + amount * window.period
    window.at = math.max(window.at, now)
  end
  local bucket
  if window.head <= window.tail then
    bucket = bucket_of(window, window.tail)
    now = math.max(now, bucket.last)
    if now - bucket.first >= math.ceil(window.period / 60) then
      bucket = nil
    end
  end
  if bucket == nil then
    bucket = {first = now, last = now, amount = 0}
    window.tail = window.tail + 1
  end
  bucket.last = now
  bucket.amount = bucket.amount + amount
  window.used = window.used + amount
  put_bucket(window, window.tail, bucket)
  return window.tail, bucket.first
end

local function remaining(window, now, limit, burst)
  local left = limit - window.used
  if burst >= 0 then
    left = math.min(left, burst - ceil_div(level_at(window, now, limit), window.period))
  end
  return math.max(0, left)
end

-- Slots: one hash for each key; each process has a field "count expires_us".

local function slot_of(text)
  if not text then
    return 0, 0
  end
  local count, expires = string.match(text, '^(%S+) (%S+)$')
  return tonumber(count), tonumber(expires)
end

local function put_slot(key, replica, count, now, lease)
  if count > 0 then
    redis.call('HSET', key, replica, whole(count) .. ' ' .. whole(now + lease))
    redis.call('PEXPIRE', key, whole(math.ceil(lease / 1000)))
  else
    redis.call('HDEL', key, replica)
  end
end
