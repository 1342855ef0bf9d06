-- ARGV: owner, seconds of the lease, how many, and ids of letters that may be claimed; without ids
-- the next of the queue. Returns the end of the lease and the letters.
local owner, lease, wanted = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local time = now()
local ends = time + lease

-- First what others have held for too long; so many at once that it keeps up, and no more.
for _, id in ipairs(redis.call('ZRANGE', P .. 'leases', '-inf', time, 'BYSCORE', 'LIMIT', 0, 100)) do
    local x = load(id)
    if x then
        leave(x)
        x.leases, x.revision = x.leases + 1, x.revision + 1
        enter(x, x.leases >= MOST_LEASES and 'parked' or x.before)
    else
        redis.call('ZREM', P .. 'leases', id)
    end
end

local claimed = {}
local function claim(x)
    local before = x.state
    leave(x)
    x.owner, x.until_, x.revision, x.before = owner, ends, x.revision + 1, before
    enter(x, 'claimed')
    claimed[#claimed + 1] = whole(x.id)
end

if #ARGV > 3 then
    for i = 4, #ARGV do
        local x = load(ARGV[i])
        if x and (x.state == 'dead' or x.state == 'queued') and #claimed < wanted then claim(x) end
    end
else
    redis.pcall('XGROUP', 'CREATE', P .. 'work', GROUP, '0', 'MKSTREAM')
    -- Without memory for the group there is no stream either, and so nothing that is queued.
    local read = redis.pcall('XREADGROUP', 'GROUP', GROUP, owner, 'COUNT', wanted, 'STREAMS',
        P .. 'work', '>')
    for _, entry in ipairs(read and not read.err and read[1][2] or {}) do
        local x = load(entry[2][2])
        if x and x.state == 'queued' and x.stream_id == entry[1] then
            claim(x)
        else
            redis.call('XACK', P .. 'work', GROUP, entry[1])
            redis.call('XDEL', P .. 'work', entry[1])
        end
    end
    redis.pcall('XGROUP', 'DELCONSUMER', P .. 'work', GROUP, owner)
end
return {tostring(ends), claimed}
