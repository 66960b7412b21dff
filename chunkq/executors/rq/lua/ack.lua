-- Take a finished task off the queue. ARGV: queue, id, attempt, worker, seconds it took.
local name, id = ARGV[1], ARGV[2]
if not end_attempt(name, id, ARGV[3]) then return 0 end
forget(id)
local me = 'rq:worker:' .. ARGV[4]
if redis.call('EXISTS', me) == 1 then
  redis.call('HINCRBY', me, 'successful_job_count', 1)
  redis.call('HINCRBYFLOAT', me, 'total_working_time', ARGV[5])
  if redis.call('HGET', me, 'current_job') == id then redis.call('HDEL', me, 'current_job') end
end
forget_if_empty(name)
return 1
