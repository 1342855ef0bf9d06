-- ARGV: id, owner, revision, what to do (done, failed, released or renewed), and for a failure:
-- what `with_latest` takes, error type, fingerprint, time, attempts; for a renewal: seconds. Returns
-- 0 where the claim is somebody else's by now; for a renewal the end of the lease.
local x = load(ARGV[1])
if not held(x, ARGV[2], tonumber(ARGV[3])) then return 0 end
local verb = ARGV[4]
if verb == 'done' then
    remove(x)
elseif verb == 'failed' then
    leave(x)
    redis.call('HSET', P .. 'l:' .. x.id, 'e', ARGV[5])
    x.error_type, x.fingerprint, x.failed_at = ARGV[6], ARGV[7], tonumber(ARGV[8])
    x.more_attempts = x.more_attempts + tonumber(ARGV[9])
    x.replays, x.leases, x.revision = x.replays + 1, 0, x.revision + 1
    enter(x, x.replays >= MOST_REPLAYS and 'parked' or 'dead')
elseif verb == 'released' then
    leave(x)
    x.revision = x.revision + 1
    enter(x, x.before)
else
    x.until_ = now() + tonumber(ARGV[5])
    redis.call('ZREM', P .. 'leases', x.id) -- frees first, see `leave`
    redis.call('ZADD', P .. 'leases', x.until_, x.id)
    save(x)
    return tostring(x.until_)
end
return 1
