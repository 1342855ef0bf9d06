-- ARGV: whether whole letters are wanted (1) or what changes of them (0), and ids. Returns those
-- letters that there are.
local found = {}
for i = 2, #ARGV do
    local id = ARGV[i]
    local letter = ARGV[1] == '1' and whole(id)
        or {id, false, redis.call('HGET', P .. 'l:' .. id, 'x'), false}
    if letter[3] then found[#found + 1] = letter end
end
return found
