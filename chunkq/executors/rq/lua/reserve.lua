-- Begin the oldest queued task; returns its queue, id, message and retries left, or nothing.
-- ARGV: worker, stamp, attempt id, lease (s), mode and names as `chosen` takes them.
local worker, stamp, attempt, lease = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local now = clock()
begin()
local grace = grace_until(now, lease)

for _, name in ipairs(chosen(ARGV[5], 6)) do
  if now > grace then
    for _, entry in ipairs(redis.call('ZRANGEBYSCORE', started(name), 0, now, 'LIMIT', 0, 100)) do
      local id, old = entry:match('^(.*):(.-)$')
      if end_attempt(name, id, old) then put_back(name, id, true, stamp) end
    end
  end
  while true do
    local id = redis.call('LPOP', queue(name))
    if not id then break end
    local key = task(id)
    -- An id may be listed twice, or still be listed when its task is gone: RQ's own tools do that.
    if redis.call('HGET', key, 'status') == 'queued' then
      local entry, me = id .. ':' .. attempt, 'rq:worker:' .. worker
      redis.call('HSET', key, 'status', 'started', 'started_at', stamp, 'last_heartbeat', stamp,
        'worker_name', worker)
      redis.call('HSET', 'rq:execution:' .. entry, 'id', attempt, 'created_at', now,
        'last_heartbeat', now, 'worker_name', worker)
      redis.call('EXPIRE', 'rq:execution:' .. entry, math.ceil(lease) + 60)
      redis.call('ZADD', 'rq:executions:' .. id, now + lease + 60, attempt)
      redis.call('ZADD', started(name), now + lease, entry)
      if redis.call('EXISTS', me) == 1 then
        redis.call('HSET', me, 'state', 'busy', 'current_job', id)
      end
      return {name, id, redis.call('HGET', key, 'data') or '',
        redis.call('HGET', key, 'retries_left') or '0'}
    end
  end
end
return false
