-- ARGV: what to do (queued, parked, dead or gone), a msgpack array of states that may be changed,
-- ids. Returns how many were.
local target, changed = ARGV[1], 0
local among = {}
for _, state in ipairs(cmsgpack.unpack(ARGV[2])) do among[state] = true end
for i = 3, #ARGV do
    local x = fetch(ARGV[i])
    if x and among[x.state] then
        if target == 'gone' then
            remove(x)
        else
            if target == 'dead' then x.replays, x.leases = 0, 0 end
            leave(x)
            x.revision = x.revision + 1
            enter(x, target)
        end
        changed = changed + 1
    end
end
return changed
