-- ARGV: owner, seconds of the lease, how many, bytes of them, whether those that are not due are
-- left (1 or 0), and ids of letters that may be claimed; without ids the next of the queue. Returns
-- the end of the lease and the letters: fewer than wanted, but at least one, where they are large.
local owner, lease, wanted, most = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local only_due = ARGV[5] == '1'
local time = now()
local ends = time + lease

-- First what others have held for too long; so many at once that it keeps up, and no more.
for _, id in ipairs(redis.call('ZRANGE', P .. 'leases', '-inf', time, 'BYSCORE', 'LIMIT', 0, 100)) do
    local x = fetch(id)
    if x then
        leave(x)
        x.leases, x.revision = x.leases + 1, x.revision + 1
        come_back(x, x.leases >= MOST_LEASES and 'parked' or x.before)
    else
        redis.call('ZREM', P .. 'leases', id)
    end
end

local claimed, size = {}, 0
local function claim(x)
    if #claimed >= wanted or (#claimed > 0 and size + x.size > most) then return end
    x.before = x.state
    leave(x)
    x.owner, x.lease_end, x.revision = owner, ends, x.revision + 1
    enter(x, 'claimed')
    claimed[#claimed + 1] = whole(x.id)
    size = size + x.size
end

if #ARGV > 5 then
    for i = 6, #ARGV do
        local x = fetch(ARGV[i])
        if x and (x.state == 'dead' or x.state == 'queued')
            and not (only_due and x.not_before > time) then claim(x) end
    end
elseif wanted > 0 then
    for _, id in ipairs(redis.call('ZRANGE', P .. 'later', '-inf', time, 'BYSCORE', 'LIMIT', 0, 100)) do
        local x = fetch(id)
        redis.call('ZREM', P .. 'later', id)
        if x then redis.call('ZADD', P .. 'ready', x.seq, id) end
    end
    for _, id in ipairs(redis.call('ZRANGE', P .. 'ready', 0, wanted - 1)) do
        local x = fetch(id)
        if x then claim(x) else redis.call('ZREM', P .. 'ready', id) end
    end
end
return {tostring(ends), claimed}
