-- ARGV: whether letters that were removed may come back (1 or 0), and thirteen a letter, see below.
-- Returns for each `stored`, `merged` or `known`.
--
-- New letters are collected and written together, one command for all that goes into one key: the
-- commands, not the bytes, are what a batch costs.
local revive, answers = ARGV[1] == '1', {}
local any_taken = redis.call('EXISTS', P .. 'taken') == 1

local new, by_id, by_same = {}, {}, {}
local function forget_new() new, by_id, by_same = {}, {}, {} end

local function add(sets, key, score, id)
    local members = sets[key]
    if members then
        local size = #members
        members[size + 1], members[size + 2] = score, id
    else
        sets[key] = {score, id}
    end
end

local function raise(counts, key, change) counts[key] = (counts[key] or 0) + change end

-- Writes what was collected; each letter itself comes last, since it is there once it can be read.
local function write_new()
    if #new == 0 then return end
    local seq = redis.call('INCRBY', P .. 'seq', #new) - #new
    local ordered, same, totals, feeds, causes = {}, {}, {}, {}, {}
    local time = now()
    for i, letter in ipairs(new) do
        local x = letter.x
        x.seq = seq + i
        add(ordered, 'all', x.seq, x.id)
        add(ordered, 's:' .. x.state, x.seq, x.id)
        add(ordered, 'f:' .. x.fingerprint, x.seq, x.id)
        if x.feed ~= '' then
            add(ordered, 'd:' .. x.feed, x.seq, x.id)
            raise(feeds, x.feed, 1)
        end
        if x.state == 'dead' then add(ordered, 'age', x.failed_at, x.id) end
        if x.state == 'queued' and x.not_before > time then
            add(ordered, 'later', x.not_before, x.id)
        elseif x.state == 'queued' then
            add(ordered, 'ready', x.seq, x.id)
        end
        raise(totals, x.state, 1)
        raise(totals, 'size', x.size)
        raise(causes, x.fingerprint, 1)
        same[#same + 1], same[#same + 2] = x.same, x.id
    end
    for key, values in pairs(ordered) do redis.call('ZADD', P .. key, unpack(values)) end
    for state, change in pairs(totals) do redis.call('HINCRBY', P .. 'totals', state, change) end
    for feed, change in pairs(feeds) do redis.call('HINCRBY', P .. 'feeds', feed, change) end
    for cause, change in pairs(causes) do redis.call('ZINCRBY', P .. 'causes', change, cause) end
    redis.call('HSET', P .. 'same', unpack(same))
    for _, letter in ipairs(new) do
        local key, x = P .. 'l:' .. letter.x.id, packed(letter.x)
        if letter.latest then
            redis.call('HSET', key, 'b', letter.blob, 'x', x, 'e', letter.latest)
        else
            redis.call('HSET', key, 'b', letter.blob, 'x', x)
        end
    end
    forget_new()
end

local function is_known(id)
    if by_id[id] then return true end
    -- Mostly neither is there, which one command says.
    if redis.call('EXISTS', P .. 'l:' .. id, P .. 'gone:' .. id) == 0 then return false end
    if redis.call('HEXISTS', P .. 'l:' .. id, 'x') == 1 then return true end
    if redis.call('EXISTS', P .. 'gone:' .. id) == 0 then return false end
    if revive then redis.call('DEL', P .. 'gone:' .. id) end
    return not revive
end

for i = 1, (#ARGV - 1) / 13 do
    local id, blob, same, feed, operation, error_type, fingerprint, failed_at, not_before, attempts,
        latest, state, replays = unpack(ARGV, 13 * i - 11, 13 * i + 1)
    failed_at, not_before = tonumber(failed_at), tonumber(not_before)
    if by_same[same] or #new == 100 then write_new() end
    local other = redis.call('HGET', P .. 'same', same)
    local x = other and fetch(other)
    if is_known(id) then
        answers[i] = 'known'
    elseif x then
        local stands = x.state
        leave(x)
        x.attempts, x.revision = x.attempts + tonumber(attempts), x.revision + 1
        fail(x, latest, {error_type = error_type, fingerprint = fingerprint, failed_at = failed_at,
            not_before = not_before})
        enter(x, stands)
        remember(id)
        answers[i] = 'merged'
    else
        local has_twin = any_taken and redis.call('HEXISTS', P .. 'taken', same) == 1
        new[#new + 1] = {blob = blob, latest = has_twin and latest, -- see `come_back`
            x = {id = id, state = state, revision = 1, attempts = tonumber(attempts),
                replays = tonumber(replays), leases = 0, owner = '', lease_end = 0, size = #blob,
                failed_at = failed_at, not_before = not_before, feed = feed, operation = operation,
                error_type = error_type, fingerprint = fingerprint, same = same, before = ''}}
        by_id[id], by_same[same] = true, true
        answers[i] = 'stored'
    end
end
write_new()
return answers
