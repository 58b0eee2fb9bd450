-- What was charged into a window was really another amount.
-- KEYS: the window. ARGV: now_us or 0, limit, period_us, burst or -1, charged, amount,
--       and the bucket's number and first_us, as the charge was answered.
local now = now_us(ARGV[1])
local limit, burst = tonumber(ARGV[2]), tonumber(ARGV[4])
local window = open_window(KEYS[1], tonumber(ARGV[3]), now)
local more = tonumber(ARGV[6]) - tonumber(ARGV[5])
local number = tonumber(ARGV[7])
if more > 0 then
  charge(window, now, more, limit, burst)
  window.has_changed = true
elseif number >= window.head and number <= window.tail then
  local bucket = bucket_of(window, number)
  -- Another time under the same number: the server has lost what it knew, and the bucket with it.
  if bucket.first == tonumber(ARGV[8]) then
    bucket.amount = bucket.amount + more
    window.used = window.used + more
    put_bucket(window, number, bucket)
    window.has_changed = true
  end
end
if window.has_changed then
  save_window(window)
end
return 0
