-- Mark a chunk as contributor of blocks, one digit each; returns the blocks that are complete now.
-- ARGV: queue name, then block, number of the contributor from 0, and how many there are, of each.
local complete = {}
-- A worker that wakes up after its job is done must leave nothing behind.
if redis.call('HEXISTS', JOBS, ARGV[1]) == 0 then return complete end
begin()
for n = 2, #ARGV, 3 do
  local block, member, of = ARGV[n], tonumber(ARGV[n + 1]), tonumber(ARGV[n + 2])
  local marks = redis.call('HGET', blocks(ARGV[1]), block) or string.rep('0', of)
  if marks ~= 'complete' and marks:sub(member + 1, member + 1) == '0' then
    marks = marks:sub(1, member) .. '1' .. marks:sub(member + 2)
    if marks:find('0') then
      redis.call('HSET', blocks(ARGV[1]), block, marks)
    else
      redis.call('HSET', blocks(ARGV[1]), block, 'complete')
      complete[#complete + 1] = block
    end
  end
end
return complete
