-- What all scripts begin with. KEYS[1] is a breaker's record, KEYS[2] its probe leases; the name in
-- the keys is their hash tag, so that they are on one node.
--
--   record   hash: the FIELDS below, times in milliseconds of this server
--   leases   sorted set of lease ids by the time at which they end
--
-- ARGV[1] is the channel on which changes are told, ARGV[2] the breaker's name.
local RECORD, LEASES, CHANNEL, NAME = KEYS[1], KEYS[2], ARGV[1], ARGV[2]
local FIELDS = {'state', 'generation', 'epoch', 'until', 'reason', 'openings', 'successes', 'since'}
local STATES = {closed = 1, open = 1, half_open = 1, forced_open = 1, disabled = 1, observe = 1}
local STAYS = {forced_open = true, disabled = true, observe = true} -- until somebody undoes it
local WEEK = 604800000
local DAY = 86400000
local MOST = 4503599627370496 -- generations: whole numbers are exact far beyond it

local time = redis.call('TIME')
local NOW = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)

local function remove_unless(key, kind)
    local found = redis.call('TYPE', key).ok
    if found ~= kind and found ~= 'none' then redis.call('DEL', key) end
end

-- Returns the record; nil where there is none, or a damaged one, which the next write replaces.
local function load()
    remove_unless(RECORD, 'hash')
    remove_unless(LEASES, 'zset')
    local values = redis.call('HMGET', RECORD, unpack(FIELDS))
    local record = {}
    for i, name in ipairs(FIELDS) do record[name] = values[i] or '' end
    local sound = STATES[record.state] and #record.reason <= 100
        and #record.epoch == 16 and string.match(record.epoch, '^[0-9a-f]+$')
    local least = {generation = 1, ['until'] = 0, openings = 0, successes = 0, since = 0}
    local most = {generation = MOST, ['until'] = NOW + 2 * DAY, openings = 1000, successes = 1000,
        since = MOST}
    for name, low in pairs(least) do
        local value = tonumber(record[name])
        -- Neither comparison is true of NaN.
        sound = sound and value and value >= low and value <= most[name]
        record[name] = value
    end
    return sound and record.generation == math.floor(record.generation) and record or nil
end

local function whole(number) return string.format('%.0f', number) end

local function answer(verdict, record, more)
    local values = {}
    for i, name in ipairs(FIELDS) do
        local value = record and record[name] or ''
        values[i] = type(value) == 'number' and whole(value) or value
    end
    return {verdict, values, whole(NOW), whole(more or 0)}
end

-- Writes the record as a new generation, and tells of it. What was leased before is so no longer.
local function save(record, before)
    record.since = NOW
    local values = {}
    for _, name in ipairs(FIELDS) do
        local value = record[name]
        values[#values + 1] = name
        values[#values + 1] = type(value) == 'number' and whole(value) or value
    end
    redis.call('DEL', LEASES)
    redis.call('HSET', RECORD, unpack(values))
    if STAYS[record.state] then
        redis.call('PERSIST', RECORD)
    else
        redis.call('PEXPIRE', RECORD, WEEK)
    end
    -- Whoever may not publish shares by the others' polls.
    redis.pcall('PUBLISH', CHANNEL, cjson.encode({
        name = NAME, from = before, to = record.state, reason = record.reason, at = NOW,
        epoch = record.epoch, generation = record.generation,
        open_for = record.state == 'open' and math.max(0, record['until'] - NOW) or nil,
    }))
end
