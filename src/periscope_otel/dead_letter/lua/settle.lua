-- ARGV: id, owner, revision, what to do (done, failed, released, damaged or renewed), and for a
-- failure: what `with_latest` takes, error type, fingerprint, time, time before which there should
-- be no replay, attempts; for a renewal: seconds. Returns 0 where the claim is somebody else's by
-- now; for a renewal the end of the lease.
local x = fetch(ARGV[1])
if not held(x, ARGV[2], tonumber(ARGV[3])) then return 0 end
local verb = ARGV[4]
if verb == 'done' then
    remove(x)
elseif verb == 'failed' then
    leave(x)
    x.failed_at = -math.huge -- what is settled now is the latest, whatever it says
    fail(x, ARGV[5], {error_type = ARGV[6], fingerprint = ARGV[7], failed_at = tonumber(ARGV[8]),
        not_before = tonumber(ARGV[9])})
    x.attempts = x.attempts + tonumber(ARGV[10])
    x.replays, x.leases, x.revision = x.replays + 1, 0, x.revision + 1
    come_back(x, x.replays >= MOST_REPLAYS and 'parked' or 'dead')
elseif verb == 'renewed' then
    x.lease_end = now() + tonumber(ARGV[5])
    redis.call('ZREM', P .. 'leases', x.id) -- frees first, see `leave`
    redis.call('ZADD', P .. 'leases', x.lease_end, x.id)
    save(x)
    return tostring(x.lease_end)
else
    leave(x)
    x.revision = x.revision + 1
    come_back(x, verb == 'damaged' and 'parked' or x.before)
end
return 1
