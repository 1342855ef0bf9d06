-- ARGV: index, newest first (1 or 0), score after which, letters wanted, letters looked at at most,
-- and a msgpack map of what they have to be. Returns the letters, and the score behind which to go
-- on, or '' where there are no more.
local index, reverse, after = ARGV[1], ARGV[2] == '1', ARGV[3]
local wanted, most = tonumber(ARGV[4]), tonumber(ARGV[5])
local where = cmsgpack.unpack(ARGV[6])
local states = {}
for _, state in ipairs(where.states) do states[state] = true end

local ids
if reverse then
    ids = redis.call('ZRANGE', P .. index, after == '' and '+inf' or '(' .. after, '-inf', 'BYSCORE',
        'REV', 'LIMIT', 0, most, 'WITHSCORES')
else
    ids = redis.call('ZRANGE', P .. index, after == '' and '-inf' or '(' .. after, '+inf', 'BYSCORE',
        'LIMIT', 0, most, 'WITHSCORES')
end

local found, last = {}, ''
for i = 1, #ids, 2 do
    local x = load(ids[i])
    if x and states[x.state]
        and (where.feed == nil or x.feed == where.feed)
        and (where.operation == nil or x.operation == where.operation)
        and (where.fingerprint == nil or x.fingerprint == where.fingerprint)
        and (where.error_type == nil or x.error_type == where.error_type)
        and (where.since == nil or x.failed_at >= where.since)
        and (where['until'] == nil or x.failed_at < where['until']) then
        found[#found + 1] = whole(ids[i])
    end
    last = ids[i + 1]
    if #found == wanted then break end
end
if #found < wanted and #ids < 2 * most then last = '' end
return {found, last}
