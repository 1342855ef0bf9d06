-- Asks for a lease to probe. ARGV[3..]: the lease's id, its milliseconds, how many may be out, an
-- epoch for a new record, and reason and openings for that.
--
-- Returns `granted` or `denied`, with the milliseconds after which to ask again, or `none` where
-- the state is not one in which calls probe; and the record that there is then.
local lease, lasts, most, new_epoch = ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6]

local function grant(record)
    redis.call('ZADD', LEASES, NOW + lasts, lease)
    redis.call('PEXPIRE', LEASES, WEEK)
    return answer('granted', record)
end

local function begin(record, before)
    record.state, record['until'], record.successes = 'half_open', 0, 0
    save(record, before)
    return grant(record)
end

local record = load()
if not record then -- it was wiped, and is known to be open
    return begin({generation = 1, epoch = new_epoch, reason = ARGV[7],
        openings = tonumber(ARGV[8])}, '')
end
if record.state == 'open' then
    if record['until'] > NOW then return answer('denied', record, record['until'] - NOW) end
    record.generation = record.generation + 1
    return begin(record, 'open')
end
if record.state == 'forced_open' then return answer('denied', record, 1000) end
if record.state ~= 'half_open' then return answer('none', record) end

redis.call('ZREMRANGEBYSCORE', LEASES, '-inf', NOW)
if redis.call('ZCARD', LEASES) < most then return grant(record) end
local first = redis.call('ZRANGE', LEASES, 0, 0, 'WITHSCORES')
return answer('denied', record, tonumber(first[2]) - NOW)
