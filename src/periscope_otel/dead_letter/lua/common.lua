-- What all scripts begin with. KEYS[1] is the prefix that all keys of a queue share, with the
-- queue's name as the hash tag, so that they are on one node.
--
--   l:<id>       hash of a letter: b (as it was put), x (what changes), e (its latest failure)
--   all          ids by order of arrival; likewise s:<state>, f:<fingerprint>, d:<feed>
--   leases       ids of claimed letters by the time at which their lease ends
--   age          ids of dead letters by the time of their latest failure
--   same         for each payload under its idempotency key the id of its letter
--   totals       how many letters and bytes there are by state, feed and fingerprint
--   work         the stream of queued letters
--   gone:<id>    a letter that was removed, or taken in by another, a moment ago

local P = KEYS[1]
local GROUP = 'replay'
local MOST_REPLAYS, MOST_LEASES = 5, 3
local REMEMBERED = 3600000 -- milliseconds for which a removed letter is known by its id

local function now()
    local time = redis.call('TIME')
    return tonumber(time[1]) + tonumber(time[2]) / 1e6
end

-- A letter's changing part, read from and written to one field. 0 and '' stand for nothing.
local FIELDS = {'state', 'revision', 'more_attempts', 'replays', 'leases', 'owner', 'until_', 'seq',
    'size', 'failed_at', 'feed', 'operation', 'error_type', 'fingerprint', 'same', 'stream_id',
    'before'}

local function load(id)
    local packed = redis.call('HGET', P .. 'l:' .. id, 'x')
    local readable, values = pcall(cmsgpack.unpack, packed or '')
    if not packed or not readable or type(values) ~= 'table' then return nil end
    local x = {id = id}
    for i, name in ipairs(FIELDS) do x[name] = values[i] end
    return x
end

local function save(x)
    local values = {}
    for i, name in ipairs(FIELDS) do values[i] = x[name] end
    redis.call('HSET', P .. 'l:' .. x.id, 'x', cmsgpack.pack(values))
end

local function count(x, sign)
    local about = cmsgpack.pack({x.state, x.feed, x.fingerprint})
    if redis.call('HINCRBY', P .. 'totals', 'n' .. about, sign) == 0 then
        redis.call('HDEL', P .. 'totals', 'n' .. about)
    end
    if redis.call('HINCRBY', P .. 'totals', 'size', sign * x.size) == 0 then
        redis.call('HDEL', P .. 'totals', 'size')
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
    elseif redis.call('HGET', P .. 'same', x.same) == x.id then
        redis.call('HDEL', P .. 'same', x.same)
    end
    if x.state == 'queued' and x.stream_id ~= '' then
        redis.call('XACK', P .. 'work', GROUP, x.stream_id)
        redis.call('XDEL', P .. 'work', x.stream_id)
        x.stream_id = ''
    end
    count(x, -1)
end

local function enter(x, state)
    x.state = state
    redis.call('ZADD', P .. 's:' .. state, x.seq, x.id)
    redis.call('ZADD', P .. 'f:' .. x.fingerprint, x.seq, x.id)
    if state == 'claimed' then
        redis.call('ZADD', P .. 'leases', x.until_, x.id)
    else
        x.owner, x.until_ = '', 0
        redis.call('HSETNX', P .. 'same', x.same, x.id)
    end
    if state == 'dead' then redis.call('ZADD', P .. 'age', x.failed_at, x.id) end
    if state == 'queued' then
        x.stream_id = redis.call('XADD', P .. 'work', '*', 'id', x.id)
    end
    count(x, 1)
    save(x)
end

local function remember(id)
    redis.call('SET', P .. 'gone:' .. id, '', 'PX', REMEMBERED)
end

local function remove(x)
    leave(x)
    redis.call('DEL', P .. 'l:' .. x.id)
    redis.call('ZREM', P .. 'all', x.id)
    if x.feed ~= '' then redis.call('ZREM', P .. 'd:' .. x.feed, x.id) end
    remember(x.id)
end

local function held(x, owner, revision)
    return x and x.state == 'claimed' and x.owner == owner and x.revision == revision
end

-- b, x and e of a letter, and its id.
local function whole(id)
    local found = redis.call('HMGET', P .. 'l:' .. id, 'b', 'x', 'e')
    return {id, found[1], found[2], found[3]}
end
