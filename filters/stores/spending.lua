-- What was spent and is reserved of budgets, by processes that share this server.
-- KEYS: of each account, what was spent (a hash: `total`, and its part by writer), and what is
--       reserved (a hash: "amount expires_us" by writer).
-- ARGV: what, now_us or 0, lease_us, keep_ms, and then for what is
--   reserve: how many accounts, of each: writer, amount, ends_at;  of each line: account, most.
--            Answer: {-1, of each account: spent, reserved} as they were before,
--                 or {the line that it would cross, spent, reserved}
--   tell:    of each account: writer, spent, reserved, ends_at. What this writer has spent in all;
--            and reserved: "-N": so much less;  "~": as much as before;  a number: so much.
-- A writer says the whole of what it knows, so that nothing counts twice that is said again.
local what, lease, keep = ARGV[1], tonumber(ARGV[3]), tonumber(ARGV[4])
local now = tonumber(ARGV[2])
if now == 0 then
  local time = redis.call('TIME')
  now = time[1] * 1000000 + time[2]
end

local MOST = '9007199254740992' -- 2^53: Lua counts exactly up to here

local function whole(number)
  return string.format('%.0f', number)
end

local function reservation(text)
  if not text then
    return 0, 0
  end
  local amount, expires = string.match(text, '^(%S+) (%S+)$')
  return tonumber(amount), tonumber(expires)
end

-- What live writers have reserved; of the others nobody knows any more.
local function reserved_of(key, writer)
  local all, own = 0, 0
  local fields = redis.call('HGETALL', key)
  for each = 1, #fields, 2 do
    local amount, expires = reservation(fields[each + 1])
    if fields[each] == writer then
      own = amount
      all = all + amount
    elseif expires > now then
      all = all + amount
    else
      redis.call('HDEL', key, fields[each])
    end
  end
  return all, own
end

local function put_reserved(key, writer, amount)
  if amount > 0 then
    redis.call('HSET', key, writer, whole(amount) .. ' ' .. whole(now + lease))
    redis.call('PEXPIRE', key, whole(math.ceil(lease / 1000)))
  else
    redis.call('HDEL', key, writer)
  end
end

if what == 'tell' then
  for index = 1, #KEYS / 2 do
    local spent_key, reserved_key = KEYS[2 * index - 1], KEYS[2 * index]
    local at = 1 + 4 * index
    local writer, spent, reserved = ARGV[at], tonumber(ARGV[at + 1]), ARGV[at + 2]
    local more = spent - tonumber(redis.call('HGET', spent_key, writer) or 0)
    if more ~= 0 then
      -- The sum first: what it has not got, the writer has not told. More than can be counted is as
      -- much as can be, so that limits hold and the accounts behind are told.
      local added = redis.pcall('HINCRBY', spent_key, 'total', whole(more))
      if type(added) == 'table' and added.err then
        redis.call('HSET', spent_key, 'total', MOST)
      end
      redis.call('HSET', spent_key, writer, whole(spent))
      redis.call('PEXPIREAT', spent_key, whole(tonumber(ARGV[at + 3]) * 1000 + keep))
    end
    local amount = reservation(redis.call('HGET', reserved_key, writer))
    if string.sub(reserved, 1, 1) == '-' then
      amount = math.max(0, amount + tonumber(reserved))
    elseif reserved ~= '~' then
      amount = tonumber(reserved)
    end
    put_reserved(reserved_key, writer, amount)
  end
  return 0
end

local count = tonumber(ARGV[5])
local accounts, answer = {}, {-1}
for index = 1, count do
  local at = 3 + 3 * index
  local account = {
    writer = ARGV[at],
    amount = tonumber(ARGV[at + 1]),
    spent = tonumber(redis.call('HGET', KEYS[2 * index - 1], 'total') or 0),
  }
  account.reserved, account.own = reserved_of(KEYS[2 * index], account.writer)
  accounts[index] = account
  answer[#answer + 1] = account.spent
  answer[#answer + 1] = account.reserved
end
for at = 6 + 3 * count, #ARGV, 2 do
  local account = accounts[tonumber(ARGV[at]) + 1]
  if account.spent + account.reserved + account.amount > tonumber(ARGV[at + 1]) then
    return {(at - 6 - 3 * count) / 2, account.spent, account.reserved}
  end
end
for index, account in ipairs(accounts) do
  if account.amount > 0 then
    put_reserved(KEYS[2 * index], account.writer, account.own + account.amount)
  end
end
return answer
