-- ARGV: twelve a letter, see below. Returns for each `stored`, `merged` or `known`.
local answers = {}
for i = 1, #ARGV / 12 do
    local id, blob, same, feed, operation, error_type, fingerprint, failed_at, attempts, latest,
        state, replays = unpack(ARGV, 12 * i - 11, 12 * i)
    failed_at, attempts, replays = tonumber(failed_at), tonumber(attempts), tonumber(replays)
    local other = redis.call('HGET', P .. 'same', same)
    local x = other and load(other)
    if other and not x then redis.call('HDEL', P .. 'same', same) end
    -- A letter is there once its changing part is, which is written last.
    if redis.call('HEXISTS', P .. 'l:' .. id, 'x') == 1
        or redis.call('EXISTS', P .. 'gone:' .. id) == 1 then
        answers[i] = 'known'
    elseif x then
        local stands = x.state
        leave(x)
        x.error_type, x.fingerprint, x.failed_at = error_type, fingerprint, failed_at
        x.more_attempts, x.revision = x.more_attempts + attempts, x.revision + 1
        redis.call('HSET', P .. 'l:' .. other, 'e', latest)
        enter(x, stands)
        remember(id)
        answers[i] = 'merged'
    else
        local seq = redis.call('INCR', P .. 'seq')
        redis.call('HSET', P .. 'l:' .. id, 'b', blob)
        redis.call('ZADD', P .. 'all', seq, id)
        if feed ~= '' then redis.call('ZADD', P .. 'd:' .. feed, seq, id) end
        enter({id = id, revision = 1, more_attempts = 0, replays = replays, leases = 0, seq = seq,
            size = #blob, failed_at = failed_at, feed = feed, operation = operation,
            error_type = error_type, fingerprint = fingerprint, same = same, stream_id = '',
            before = ''}, state)
        answers[i] = 'stored'
    end
end
return answers
