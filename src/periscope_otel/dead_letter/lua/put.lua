-- ARGV: whether letters that were removed may come back (1 or 0), and thirteen a letter, see below.
-- Returns for each `stored`, `merged` or `known`.
local revive, answers = ARGV[1] == '1', {}
for i = 1, (#ARGV - 1) / 13 do
    local id, blob, same, feed, operation, error_type, fingerprint, failed_at, not_before, attempts,
        latest, state, replays = unpack(ARGV, 13 * i - 11, 13 * i + 1)
    local failure = {error_type = error_type, fingerprint = fingerprint,
        failed_at = tonumber(failed_at), not_before = tonumber(not_before)}
    local other = redis.call('HGET', P .. 'same', same)
    local x = other and fetch(other)
    if other and not x then redis.call('HDEL', P .. 'same', same) end
    -- A letter is there once its changing part is, which is written last.
    if redis.call('HEXISTS', P .. 'l:' .. id, 'x') == 1
        or (not revive and redis.call('EXISTS', P .. 'gone:' .. id) == 1) then
        answers[i] = 'known'
    elseif x then
        local stands = x.state
        leave(x)
        x.attempts, x.revision = x.attempts + tonumber(attempts), x.revision + 1
        fail(x, latest, failure)
        enter(x, stands)
        remember(id)
        answers[i] = 'merged'
    else
        local seq = redis.call('INCR', P .. 'seq')
        redis.call('HSET', P .. 'l:' .. id, 'b', blob)
        if redis.call('HEXISTS', P .. 'taken', same) == 1 then -- see `come_back`
            redis.call('HSET', P .. 'l:' .. id, 'e', latest)
        end
        redis.call('ZADD', P .. 'all', seq, id)
        if feed ~= '' then
            redis.call('ZADD', P .. 'd:' .. feed, seq, id)
            count('feeds', feed, 1)
        end
        count('totals', 'size', #blob)
        enter({id = id, revision = 1, attempts = tonumber(attempts), replays = tonumber(replays),
            leases = 0, owner = '', lease_end = 0, seq = seq, size = #blob,
            failed_at = failure.failed_at, not_before = failure.not_before, feed = feed,
            operation = operation, error_type = error_type, fingerprint = fingerprint, same = same,
            before = ''}, state)
        redis.call('DEL', P .. 'gone:' .. id)
        answers[i] = 'stored'
    end
end
return answers
