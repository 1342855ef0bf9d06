-- Gives a lease back. ARGV[3..]: its id, how the probe ended, and how many have to succeed.
--
-- Returns `closed` where this success was the last one that was needed, `kept` where the lease was
-- given back, and `gone` where it was no longer there, which changes nothing; and the record.
local lease, outcome, needed = ARGV[3], ARGV[4], tonumber(ARGV[5])

local record = load()
if redis.call('ZREM', LEASES, lease) == 0 then return answer('gone', record) end
if not record or record.state ~= 'half_open' or outcome ~= 'success' then
    return answer('kept', record)
end
record.successes = math.max(0, record.successes) + 1
if record.successes < needed then
    redis.call('HSET', RECORD, 'successes', whole(record.successes))
    return answer('kept', record)
end
record.state, record.reason, record['until'], record.successes = 'closed', 'recovered', 0, 0
record.generation = record.generation + 1
save(record, 'half_open')
return answer('closed', record)
