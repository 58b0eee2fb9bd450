-- Adds sums to one minute of the ledger.
-- KEYS  1 sums of the minute  2 groups of the day
-- ARGV  1 seconds to keep both  2 number of groups
--       then for each group: its id, what it stands for; then pairs: field, amount
local keep_s, groups = tonumber(ARGV[1]), tonumber(ARGV[2])
for i = 3, 2 + 2 * groups, 2 do
    redis.call('HSETNX', KEYS[2], ARGV[i], ARGV[i + 1])
end
for i = 3 + 2 * groups, #ARGV, 2 do
    redis.call('HINCRBY', KEYS[1], ARGV[i], ARGV[i + 1])
end
for _, key in ipairs(KEYS) do
    -- The day's groups are needed as long as its last minute.
    local left_s = redis.call('TTL', key)
    local wanted_s = key == KEYS[2] and keep_s + 86400 or keep_s
    if left_s < wanted_s then
        redis.call('EXPIRE', key, wanted_s)
    end
end
