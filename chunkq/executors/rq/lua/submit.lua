-- Queue the tasks of one job that are neither queued nor running; return how many are newly queued,
-- and how many are queued in total.
-- ARGV: queue name, job, stamp, maximum number of attempts, then id and message of each task.
local name, job, stamp, retries = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]) - 1
local new = {}
for n = 5, #ARGV, 2 do
  local id, key = ARGV[n], task(ARGV[n])
  local status = redis.call('HGET', key, 'status')
  if status ~= 'queued' and status ~= 'started' then
    if status then
      redis.call('ZREM', failed(name), id)
      delete_task(id)
    end
    redis.call('HSET', key, 'status', 'queued', 'created_at', stamp, 'enqueued_at', stamp,
      'origin', name, 'data', ARGV[n + 1], 'retries_left', retries, 'timeout', -1,
      'result_ttl', 0, 'failure_ttl', -1)
    new[#new + 1] = id
  end
end
for first = 1, #new, 1000 do
  redis.call('RPUSH', queue(name), unpack(new, first, math.min(first + 999, #new)))
end
if #new > 0 then
  redis.call('SADD', 'rq:queues', queue(name))
  redis.call('ZADD', ORDER, 'NX', clock(), name)
  redis.call('HSET', JOBS, name, job)
end
return {#new, redis.call('LLEN', queue(name))}
