-- ARGV: ids. Returns those letters that there are.
local found = {}
for _, id in ipairs(ARGV) do
    local letter = whole(id)
    if letter[2] then found[#found + 1] = letter end
end
return found
