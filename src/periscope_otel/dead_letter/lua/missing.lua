-- ARGV: ids. Returns those of which nothing is known: neither there nor removed a moment ago.
local missing = {}
for _, id in ipairs(ARGV) do
    if redis.call('HEXISTS', P .. 'l:' .. id, 'x') == 0
        and redis.call('EXISTS', P .. 'gone:' .. id) == 0 then
        missing[#missing + 1] = id
    end
end
return missing
