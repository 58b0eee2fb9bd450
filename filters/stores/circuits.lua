-- One circuit that several processes share: the rules of filters/algo/circuit.py, which see.
-- KEYS: the circuit (a hash), what operators have forced (a hash), all circuits (a set).
-- ARGV: what to do; the time in seconds, empty: the server's; for how many milliseconds to keep a
-- circuit that nobody asks for; the circuit's upstream and model; then by what is to do:
--   admit   the rules, the attempt's token
--   report  the rules, the attempt's token, its epoch, the verdict, a random number from 0 up to 1
--   force   "open", "closed", or empty: by itself again. The model * stands for all
--   show
-- Answer: state, failures, seconds until it may be tried, forced state, 1 if the state is new; then
-- of admit: 1 if the attempt may go, its epoch, 1 if it is a probe, the seconds to wait. Numbers
-- that are no integers are texts. Nothing, for a circuit to show that is not there.
-- Times are doubles and all sums are made in the same order as there, so both find the same.

local op, now, keep_ms, upstream, model = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4], ARGV[5]
if not now then
  local time = redis.call('TIME')
  now = tonumber(time[1]) + tonumber(time[2]) / 1000000
end
local second = math.floor(now)
local name = upstream .. '|' .. model
local CELLS = 600
local PLACE_WAIT_S = 1

local function text(number)
  return string.format('%.17g', number)
end

-- The circuit as it is kept. Epochs begin with the time: one that was lost, or had expired, never
-- takes what is reported late for its own.
local c = {}
local kept = redis.call('HMGET', KEYS[1], 'state', 'epoch', 'failures', 'successes', 'reopened',
  'until', 'forced', 'commands', 'probes')
local is_new = not kept[1]
c.state = kept[1] or 'closed'
c.epoch = tonumber(kept[2] or math.floor(now * 1000000))
c.failures = tonumber(kept[3] or 0)
c.successes = tonumber(kept[4] or 0)
c.reopened = tonumber(kept[5] or 0)
c.open_until = tonumber(kept[6] or 0)
c.forced = kept[7] or ''
c.commands = tonumber(kept[8] or 0) -- the last of the operators' that it has obeyed
c.probes = {} -- tokens, and until when they hold their places
for token, lease in string.gmatch(kept[9] or '', '([^=,]+)=([^,]+)') do
  c.probes[#c.probes + 1] = {token, tonumber(lease)}
end
local before = c.state
local is_changed = false

local function save()
  local probes = {}
  for i, probe in ipairs(c.probes) do
    probes[i] = probe[1] .. '=' .. text(probe[2])
  end
  redis.call('HSET', KEYS[1], 'state', c.state, 'epoch', text(c.epoch), 'failures', c.failures,
    'successes', c.successes, 'reopened', c.reopened, 'until', text(c.open_until),
    'forced', c.forced, 'commands', c.commands, 'probes', table.concat(probes, ','))
  redis.call('PEXPIRE', KEYS[1], keep_ms)
  redis.call('SADD', KEYS[3], name)
end

local function close()
  c.state = 'closed'
  c.epoch = c.epoch + 1
  c.failures, c.successes, c.reopened = 0, 0, 0
  is_changed = true
end

local function obey()
  local last, forced = c.commands, nil
  for _, command in ipairs(redis.call('HMGET', KEYS[2], name, upstream .. '|*')) do
    if command then
      local number, state = string.match(command, '(%d+) (.*)')
      if tonumber(number) > last then
        last, forced = tonumber(number), state
      end
    end
  end
  if forced then
    close()
    c.commands, c.forced = last, forced
    if forced ~= '' then
      c.state = forced
    end
  end
end

local function answer(...)
  if is_changed or (is_new and op ~= 'report') then
    save()
  end
  local retry_in = '0'
  if c.state == 'open' then
    retry_in = c.forced ~= '' and '' or text(math.max(0, c.open_until - now))
  end
  return {c.state, c.failures, retry_in, c.forced, c.state ~= before and 1 or 0, ...}
end

if op == 'force' then
  local number = redis.call('HINCRBY', KEYS[2], 'number', 1)
  redis.call('HSET', KEYS[2], name, number .. ' ' .. ARGV[6])
  if model ~= '*' then
    obey()
  end
  return model ~= '*' and answer() or false
end

obey()

if op == 'show' then
  if is_new and c.forced == '' then
    redis.call('SREM', KEYS[3], name)
    return false
  end
  return answer()
end

local rules = {
  failure_threshold = tonumber(ARGV[6]),
  failure_rate = tonumber(ARGV[7]), -- nil: not counted
  window_s = tonumber(ARGV[8]),
  min_calls = tonumber(ARGV[9]),
  recovery_timeout_s = tonumber(ARGV[10]),
  max_recovery_timeout_s = tonumber(ARGV[11]),
  recovery_jitter = tonumber(ARGV[12]),
  success_threshold = tonumber(ARGV[13]),
  half_open_max = tonumber(ARGV[14]),
  probe_lease_s = tonumber(ARGV[15]),
}
local token = ARGV[16]

if op == 'admit' then
  redis.call('PEXPIRE', KEYS[1], keep_ms)
  if c.state == 'closed' then
    return answer(1, text(c.epoch), 0, '')
  end
  if c.state == 'open' then
    if c.forced ~= '' then
      return answer(0, '', 0, '')
    end
    if now < c.open_until then
      return answer(0, '', 0, text(c.open_until - now))
    end
    c.state = 'half_open'
    c.successes = 0
    is_changed = true
  end
  local probes = {}
  for _, probe in ipairs(c.probes) do
    if probe[2] > now then
      probes[#probes + 1] = probe
    end
  end
  c.probes = probes
  if #probes >= rules.half_open_max then
    return answer(0, '', 0, text(math.min(PLACE_WAIT_S, rules.recovery_timeout_s / 2)))
  end
  probes[#probes + 1] = {token, now + rules.probe_lease_s}
  is_changed = true
  return answer(1, text(c.epoch), 1, '')
end

-- report
local epoch, verdict, rand = tonumber(ARGV[17]), ARGV[18], tonumber(ARGV[19])

for i, probe in ipairs(c.probes) do
  if probe[1] == token then
    table.remove(c.probes, i)
    is_changed = true
    break
  end
end

local function open()
  local longest = math.max(rules.max_recovery_timeout_s, rules.recovery_timeout_s)
  local grown = math.min(rules.recovery_timeout_s * 2 ^ math.min(c.reopened, 60), longest)
  c.state = 'open'
  c.epoch = c.epoch + 1
  c.open_until = now + grown * (1 - rules.recovery_jitter * rand)
end

-- Outcomes and failures of one second of this epoch.
local function cell(at, value)
  local in_epoch, in_second, count, failures =
    string.match(value or '', '(%d+) (%d+) (%d+) (%d+)')
  if tonumber(in_epoch) == c.epoch and tonumber(in_second) == at then
    return tonumber(count), tonumber(failures)
  end
  return 0, 0
end

local function count_outcome(failed)
  local field = 'w' .. second % CELLS
  local count, failures = cell(second, redis.call('HGET', KEYS[1], field))
  redis.call('HSET', KEYS[1], field,
    string.format('%.0f %d %d %d', c.epoch, second, count + 1, failures + failed))
end

local function fails_too_often()
  local fields = {}
  for i = 1, rules.window_s do
    fields[i] = 'w' .. (second - rules.window_s + i) % CELLS
  end
  local sum, failed = 0, 0
  for i, value in ipairs(redis.call('HMGET', KEYS[1], unpack(fields))) do
    local count, failures = cell(second - rules.window_s + i, value)
    sum, failed = sum + count, failed + failures
  end
  return sum >= rules.min_calls and failed / sum >= rules.failure_rate
end

if epoch ~= c.epoch or c.forced ~= '' or verdict == 'none' then
  return answer()
end
if verdict == 'success' then
  if c.state == 'half_open' then
    c.successes = c.successes + 1
    is_changed = true
    if c.successes >= rules.success_threshold then
      close()
    end
    return answer()
  end
  is_changed = is_changed or c.failures > 0
  c.failures = 0
  if rules.failure_rate then
    count_outcome(0)
  end
  return answer()
end
c.failures = c.failures + 1
is_changed = true
if c.state == 'half_open' then
  c.reopened = c.reopened + 1
  open()
elseif not rules.failure_rate then
  if c.failures >= rules.failure_threshold then
    open()
  end
else
  count_outcome(1)
  if fails_too_often() then
    open()
  end
end
return answer()
