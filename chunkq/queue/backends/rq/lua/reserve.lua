-- Lease the oldest queued task; return its queue, id, message and number of retries, or false.
-- ARGV: worker, stamp, attempt id, lease (s), then the arguments of `selected_queues`.
local worker, stamp, attempt, lease = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local now = clock()
allow_when_full()
local grace = grace_until(now, lease)

for _, name in ipairs(selected_queues(ARGV[5], 6)) do
  if now > grace then
    local ended = redis.call(
      'ZRANGEBYSCORE', started(name), 0, now, 'WITHSCORES', 'LIMIT', 0, 100)
    for n = 1, #ended, 2 do
      local id, expired = ended[n]:match('^(.*):(.-)$')
      if end_attempt(name, id, expired) then
        requeue(name, id, not was_lost(id, tonumber(ended[n + 1])), stamp)
      end
    end
  end
  while true do
    local id = redis.call('LPOP', queue(name))
    if not id then break end
    local key = task(id)
    if is_closed(name, kind_of(id)) then
      -- RQ's own tools queue a task without regard to its gate.
      if redis.call('HGET', key, 'status') == 'queued' then enqueue(name, id, 'RPUSH') end
    -- They can also list an id twice, or keep the id of a deleted task.
    elseif redis.call('HGET', key, 'status') == 'queued' then
      local entry, worker_key = id .. ':' .. attempt, 'rq:worker:' .. worker
      redis.call('HSET', key, 'status', 'started', 'started_at', stamp, 'last_heartbeat', stamp,
        'worker_name', worker)
      redis.call('HSET', 'rq:execution:' .. entry, 'id', attempt, 'created_at', now,
        'last_heartbeat', now, 'worker_name', worker)
      redis.call('EXPIRE', 'rq:execution:' .. entry, math.ceil(lease) + 60)
      redis.call('ZADD', 'rq:executions:' .. id, now + lease + 60, attempt)
      redis.call('ZADD', started(name), now + lease, entry)
      if redis.call('EXISTS', worker_key) == 1 then
        redis.call('HSET', worker_key, 'state', 'busy', 'current_job', id)
      end
      return {name, id, redis.call('HGET', key, 'data') or '',
        redis.call('HGET', key, 'retries_left') or '0'}
    end
  end
end
return false
