-- Notes that a breaker has a record. KEYS[1]: names by the time until which their records stay.
-- ARGV: the name, whether its record stays until somebody undoes it (1 or 0), how many names fit.
local WEEK = 604800000
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)

local kind = redis.call('TYPE', KEYS[1]).ok
if kind ~= 'zset' and kind ~= 'none' then redis.call('DEL', KEYS[1]) end
redis.call('ZADD', KEYS[1], ARGV[2] == '1' and '+inf' or now + WEEK, ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
redis.call('ZREMRANGEBYRANK', KEYS[1], 0, -tonumber(ARGV[3]) - 1)
if redis.call('ZCOUNT', KEYS[1], '+inf', '+inf') > 0 then
    redis.call('PERSIST', KEYS[1])
else
    redis.call('PEXPIRE', KEYS[1], WEEK)
end
