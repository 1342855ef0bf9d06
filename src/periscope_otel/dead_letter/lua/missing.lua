-- ARGV: ids. Returns those of which nothing is known: neither there nor removed a moment ago.
-- Whoever asks gives up its own copy of all others, so only one who may write can answer: what a
-- replica has is gone as soon as it has a new master. It refuses this, which removes nothing.
redis.call('DEL', P .. 'nothing')
local missing = {}
for _, id in ipairs(ARGV) do
    if redis.call('HEXISTS', P .. 'l:' .. id, 'x') == 0
        and redis.call('EXISTS', P .. 'gone:' .. id) == 0 then
        missing[#missing + 1] = id
    end
end
return missing
