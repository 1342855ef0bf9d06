-- Writes a verdict if it is made of the newest that there is. ARGV[3..]: epoch and generation that
-- the writer knows of ('' and 0 for none), an epoch for a new record, state, reason, for how many
-- milliseconds it is open, openings, and whether it is written whatever there is (1 or 0).
--
-- Returns `won`, or `lost` where another was first; and the record that there is then.
local epoch, generation, new_epoch = ARGV[3], tonumber(ARGV[4]), ARGV[5]
local state, reason, open_for, openings = ARGV[6], ARGV[7], tonumber(ARGV[8]), tonumber(ARGV[9])

local record = load()
if record and ARGV[10] ~= '1' then
    -- A record that is older than what the writer has seen is that of a replica that lagged behind.
    local known = epoch == record.epoch and generation >= record.generation
    local begun = epoch == '' and record.state == 'closed'
    if not known and not begun then return answer('lost', record) end
end

local before = record and record.state or ''
local newest = record and record.generation or 0
if record and epoch == record.epoch then newest = math.max(newest, generation) end
record = {
    state = state,
    generation = newest + 1,
    epoch = record and record.epoch or new_epoch,
    ['until'] = state == 'open' and NOW + open_for or 0,
    reason = reason,
    openings = openings,
    successes = 0,
}
save(record, before)
return answer('won', record)
