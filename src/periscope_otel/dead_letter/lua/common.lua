-- What all scripts begin with. KEYS[1] is the prefix that all keys of a queue share, with the
-- queue's name as the hash tag, so that they are on one node.
--
--   l:<id>       hash of a letter: b (as it was put), x (what changes), e (its latest failure)
--   all          ids by order of arrival; likewise s:<state>, f:<fingerprint>, d:<feed>
--   ready        queued letters that are due, by order of arrival
--   later        queued letters that are not, by the time from which they are
--   leases       ids of claimed letters by the time at which their lease ends
--   age          ids of dead letters by the time of their latest failure
--   same         for each payload under its idempotency key the id of its letter, unless claimed
--   taken        for each of them how many letters of it are claimed
--   totals       letters by state, and the bytes of all (`size`)
--   feeds        letters by feed
--   causes       fingerprints by the number of their letters
--   gone:<id>    a letter that was removed, or taken in by another, a moment ago
--
-- There is no stream with a consumer group. A claim chooses by filter, by arrival and by due time,
-- which a stream cannot; its lease is on the letter, with the revision that fences it; and an entry
-- would be acknowledged and deleted by the script that reads it, so the group's pending list, its
-- reason to be, would always be empty.

local P = KEYS[1]
local MOST_REPLAYS, MOST_LEASES = 5, 3
local REMEMBERED = 3600000 -- milliseconds for which a removed letter is known by its id

local function now()
    local time = redis.call('TIME')
    return tonumber(time[1]) + tonumber(time[2]) / 1e6
end

-- A letter's changing part, read from and written to one field. 0 and '' stand for nothing. What a
-- newer version has added behind these stays as it is.
local FIELDS = {'state', 'revision', 'attempts', 'replays', 'leases', 'owner', 'lease_end', 'seq',
    'size', 'failed_at', 'not_before', 'feed', 'operation', 'error_type', 'fingerprint', 'same',
    'before'}

local function fetch(id)
    local packed = redis.call('HGET', P .. 'l:' .. id, 'x')
    local readable, values = pcall(cmsgpack.unpack, packed or '')
    if not packed or not readable or type(values) ~= 'table' then return nil end
    local x = {id = id, added = {}}
    for i, value in ipairs(values) do
        if FIELDS[i] then x[FIELDS[i]] = value else x.added[#x.added + 1] = value end
    end
    return x
end

local function packed(x)
    local values = {}
    for i, name in ipairs(FIELDS) do values[i] = x[name] end
    for _, value in ipairs(x.added or {}) do values[#values + 1] = value end
    return cmsgpack.pack(values)
end

local function save(x)
    redis.call('HSET', P .. 'l:' .. x.id, 'x', packed(x))
end

local function count(hash, field, change)
    if redis.call('HINCRBY', P .. hash, field, change) == 0 then
        redis.call('HDEL', P .. hash, field)
    end
end

local function count_cause(x, change)
    if tonumber(redis.call('ZINCRBY', P .. 'causes', change, x.fingerprint)) <= 0 then
        redis.call('ZREM', P .. 'causes', x.fingerprint)
    end
end

-- Takes a letter out of all that depends on its state. What frees memory comes first: with it a
-- script may also write where Redis has no memory left.
local function leave(x)
    redis.call('ZREM', P .. 's:' .. x.state, x.id)
    redis.call('ZREM', P .. 'f:' .. x.fingerprint, x.id)
    if x.state == 'dead' then redis.call('ZREM', P .. 'age', x.id) end
    if x.state == 'claimed' then
        redis.call('ZREM', P .. 'leases', x.id)
        count('taken', x.same, -1)
    elseif redis.call('HGET', P .. 'same', x.same) == x.id then
        redis.call('HDEL', P .. 'same', x.same)
    end
    if x.state == 'queued' then
        redis.call('ZREM', P .. 'ready', x.id)
        redis.call('ZREM', P .. 'later', x.id)
    end
    count('totals', x.state, -1)
    count_cause(x, -1)
end

local function enter(x, state)
    x.state = state
    redis.call('ZADD', P .. 's:' .. state, x.seq, x.id)
    redis.call('ZADD', P .. 'f:' .. x.fingerprint, x.seq, x.id)
    if state == 'claimed' then
        redis.call('ZADD', P .. 'leases', x.lease_end, x.id)
        count('taken', x.same, 1)
    else
        x.owner, x.lease_end = '', 0
        redis.call('HSETNX', P .. 'same', x.same, x.id)
    end
    if state == 'dead' then redis.call('ZADD', P .. 'age', x.failed_at, x.id) end
    if state == 'queued' and x.not_before > now() then
        redis.call('ZADD', P .. 'later', x.not_before, x.id)
    elseif state == 'queued' then
        redis.call('ZADD', P .. 'ready', x.seq, x.id)
    end
    count('totals', state, 1)
    count_cause(x, 1)
    save(x)
end

local function remember(id)
    redis.call('SET', P .. 'gone:' .. id, '', 'PX', REMEMBERED)
end

local function remove(x)
    leave(x)
    redis.call('DEL', P .. 'l:' .. x.id)
    redis.call('ZREM', P .. 'all', x.id)
    if x.feed ~= '' then
        redis.call('ZREM', P .. 'd:' .. x.feed, x.id)
        count('feeds', x.feed, -1)
    end
    count('totals', 'size', -x.size)
    remember(x.id)
end

-- Takes over another failure of the same payload, unless it is the older one.
local function fail(x, latest, failure)
    if failure.failed_at < x.failed_at then return end
    for _, name in ipairs({'error_type', 'fingerprint', 'failed_at', 'not_before'}) do
        x[name] = failure[name]
    end
    redis.call('HSET', P .. 'l:' .. x.id, 'e', latest)
end

-- Ends a claim without success. The same payload may have been put meanwhile: that letter is taken
-- in, so that one is left; where it is parked, that one is.
local function come_back(x, state)
    local other = redis.call('HGET', P .. 'same', x.same)
    local twin = other and other ~= x.id and fetch(other)
    if twin then
        local latest = redis.call('HGET', P .. 'l:' .. other, 'e')
        if twin.state == 'parked' then state = 'parked' end
        x.attempts = x.attempts + twin.attempts
        if latest and twin.failed_at > x.failed_at then fail(x, latest, twin) end
        remove(twin)
    end
    enter(x, state)
end

local function held(x, owner, revision)
    return x and x.state == 'claimed' and x.owner == owner and x.revision == revision
end

-- b, x and e of a letter, and its id.
local function whole(id)
    local found = redis.call('HMGET', P .. 'l:' .. id, 'b', 'x', 'e')
    return {id, found[1], found[2], found[3]}
end
