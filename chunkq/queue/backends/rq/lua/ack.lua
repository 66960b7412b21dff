-- Delete a finished task; return 1, or 0 if the attempt had ended before.
-- ARGV: queue, id, attempt, worker, duration (s).
local name, id = ARGV[1], ARGV[2]
if not end_attempt(name, id, ARGV[3]) then return 0 end
delete_task(id)
local worker = 'rq:worker:' .. ARGV[4]
if redis.call('EXISTS', worker) == 1 then
  redis.call('HINCRBY', worker, 'successful_job_count', 1)
  redis.call('HINCRBYFLOAT', worker, 'total_working_time', ARGV[5])
  if redis.call('HGET', worker, 'current_job') == id then
    redis.call('HDEL', worker, 'current_job')
  end
end
delete_if_empty(name)
return 1
