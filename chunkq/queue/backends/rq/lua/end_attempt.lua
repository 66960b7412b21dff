-- End unsuccessful attempts; return how many had not ended before.
-- ARGV: counted (0 or 1), stamp, worker, then queue, id and attempt of each task.
local counted, stamp, worker = ARGV[1] == '1', ARGV[2], 'rq:worker:' .. ARGV[3]
local ended = 0
for n = 4, #ARGV, 3 do
  local name, id = ARGV[n], ARGV[n + 1]
  if end_attempt(name, id, ARGV[n + 2]) then
    ended = ended + 1
    requeue(name, id, counted, stamp)
    delete_if_empty(name)
  end
end
if counted and ended > 0 and redis.call('EXISTS', worker) == 1 then
  redis.call('HINCRBY', worker, 'failed_job_count', ended)
end
return ended
