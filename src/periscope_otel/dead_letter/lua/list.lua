-- ARGV: newest first (1 or 0), score after which, letters wanted, letters looked at at most, bytes
-- of letters, whether only ids are wanted (1 or 0), and a msgpack map of what the letters have to
-- be. Returns letters or ids, and the score behind which to go on, or '' where there are no more.
local reverse, after, wanted, most = ARGV[1] == '1', ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local bytes, only_ids = tonumber(ARGV[5]), ARGV[6] == '1'
local where = cmsgpack.unpack(ARGV[7])
local states = {}
for _, state in ipairs(where.states) do states[state] = true end

-- The shortest list that has them all. Each is by order of arrival, so one call may go on in
-- another list than the one before.
local lists = {'all'}
if #where.states == 1 then lists[2] = 's:' .. where.states[1] end
if where.fingerprint then lists[#lists + 1] = 'f:' .. where.fingerprint end
if where.feed and where.feed ~= '' then lists[#lists + 1] = 'd:' .. where.feed end
local index, shortest
for _, name in ipairs(lists) do
    local length = redis.call('ZCARD', P .. name)
    if not shortest or length < shortest then index, shortest = name, length end
end

local ids
if reverse then
    ids = redis.call('ZRANGE', P .. index, after == '' and '+inf' or '(' .. after, '-inf', 'BYSCORE',
        'REV', 'LIMIT', 0, most, 'WITHSCORES')
else
    ids = redis.call('ZRANGE', P .. index, after == '' and '-inf' or '(' .. after, '+inf', 'BYSCORE',
        'LIMIT', 0, most, 'WITHSCORES')
end

local function meant(x)
    return x and states[x.state]
        and (where.feed == nil or x.feed == where.feed)
        and (where.operation == nil or x.operation == where.operation)
        and (where.fingerprint == nil or x.fingerprint == where.fingerprint)
        and (where.error_type == nil or x.error_type == where.error_type)
        and (where.since == nil or x.failed_at >= where.since)
        and (where['until'] == nil or x.failed_at < where['until'])
end

local found, size, last = {}, 0, after
for i = 1, #ids, 2 do
    local x = fetch(ids[i])
    if meant(x) then
        size = size + x.size
        if not only_ids and #found > 0 and size > bytes then return {found, last} end
        found[#found + 1] = only_ids and ids[i] or whole(ids[i])
    end
    last = ids[i + 1]
    if #found == wanted then return {found, last} end
end
return {found, #ids < 2 * most and '' or last}
