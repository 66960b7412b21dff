-- Record a committed contributor of tasks, as one digit per contributor; return the tasks that
-- this completes. ARGV: queue name, then id, number (from 0) and total number of contributors.
local complete = {}
-- A worker that was suspended until its job was done must not create keys.
if redis.call('HEXISTS', JOBS, ARGV[1]) == 0 then return complete end
allow_when_full()
for n = 2, #ARGV, 3 do
  local id, member, of = ARGV[n], tonumber(ARGV[n + 1]), tonumber(ARGV[n + 2])
  local marks = redis.call('HGET', contributions(ARGV[1]), id) or string.rep('0', of)
  if marks ~= 'complete' and marks:sub(member + 1, member + 1) == '0' then
    marks = marks:sub(1, member) .. '1' .. marks:sub(member + 2)
    if marks:find('0') then
      redis.call('HSET', contributions(ARGV[1]), id, marks)
    else
      redis.call('HSET', contributions(ARGV[1]), id, 'complete')
      complete[#complete + 1] = id
    end
  end
end
return complete
