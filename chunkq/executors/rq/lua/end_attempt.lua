-- End attempts without success; returns how many had not ended before.
-- ARGV: counted (0 or 1), stamp, worker, then queue, id and attempt of each.
local counted, stamp, me = ARGV[1] == '1', ARGV[2], 'rq:worker:' .. ARGV[3]
local ended = 0
for n = 4, #ARGV, 3 do
  local name, id = ARGV[n], ARGV[n + 1]
  if end_attempt(name, id, ARGV[n + 2]) then
    ended = ended + 1
    put_back(name, id, counted, stamp)
    forget_if_empty(name)
  end
end
if counted and ended > 0 and redis.call('EXISTS', me) == 1 then
  redis.call('HINCRBY', me, 'failed_job_count', ended)
end
return ended
