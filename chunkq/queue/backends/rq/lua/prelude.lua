-- Keys of RQ 2.12, and those of chunkq: ORDER ranks the queues by the time of their first task, JOBS
-- maps a queue to its job. The gates of a job are a sorted set of kinds with a number each, in the
-- order in which they were closed; it is negative while a gate opens. Each gate has a list of waiting
-- tasks, which RQ's tools show as deferred. Every script is atomic, so a killed process loses nothing.
local ORDER, JOBS = 'chunkq:queues', 'chunkq:jobs'
local function queue(name) return 'rq:queue:' .. name end
local function started(name) return 'rq:wip:' .. name end
local function failed(name) return 'rq:failed:' .. name end
local function contributions(name) return 'chunkq:contributions:' .. name end
local function gates(name) return 'chunkq:gates:' .. name end
local function waiting(name, kind) return 'chunkq:waiting:' .. name .. ':' .. kind end
local function task(id) return 'rq:job:' .. id end

-- Return the time of the server (s, Unix). The clocks of workers may differ.
local function clock()
  local time = redis.call('TIME')
  return tonumber(time[1]) + tonumber(time[2]) / 1000000
end

-- Allow the script to write to a full Redis, which rejects writes unless the script has already
-- changed something. The scripts of workers call this first, because running tasks frees memory.
local function allow_when_full() redis.call('DEL', 'chunkq:nothing') end

-- Shorten leases that were made before the clock of the server was put back.
local function clock_was_put_back(now, lease)
  redis.call('DEL', 'chunkq:grace')
  for _, name in ipairs(redis.call('ZRANGE', ORDER, 0, -1)) do
    for _, entry in ipairs(redis.call('ZRANGEBYSCORE', started(name), now + lease, '+inf')) do
      redis.call('ZADD', started(name), now + lease, entry)
    end
  end
end

-- Record a request of a worker; return the time until which leases do not expire. While the server
-- was unreachable no lease could be renewed, so after an outage all leases are extended once.
local function grace_until(now, lease)
  local seen = tonumber(redis.call('GET', 'chunkq:seen') or now)
  if seen - now > lease / 2 then clock_was_put_back(now, lease) end
  if seen == now or math.abs(now - seen) > lease / 20 then redis.call('SET', 'chunkq:seen', now) end
  if now - seen > lease / 2 then redis.call('SET', 'chunkq:grace', now + lease) end
  return tonumber(redis.call('GET', 'chunkq:grace') or 0)
end

-- Return the queues that a worker reserves tasks from, ordered by job age: those whose names begin
-- with `prefix`, without the queues in ARGV from index `first`.
local function selected_queues(prefix, first)
  local skipped, selected = {}, {}
  for n = first, #ARGV do skipped[ARGV[n]] = true end
  for _, name in ipairs(redis.call('ZRANGE', ORDER, 0, -1)) do
    if not skipped[name] and name:sub(1, #prefix) == prefix then selected[#selected + 1] = name end
  end
  return selected
end

-- Return the kind of a task, from its id.
local function kind_of(id) return id:match('^%x+%-%x+%-(%l+)%-') or '' end

-- Return whether the gate of a kind is closed.
local function is_closed(name, kind)
  return (tonumber(redis.call('ZSCORE', gates(name), kind) or 0)) > 0
end

-- Return the number of waiting tasks of a queue, and the first kind that has any.
local function count_waiting(name)
  local total, first, least = 0, nil, nil
  local entries = redis.call('ZRANGE', gates(name), 0, -1, 'WITHSCORES')
  for n = 1, #entries, 2 do
    local count, number = redis.call('LLEN', waiting(name, entries[n])), tonumber(entries[n + 1])
    total = total + count
    if count > 0 and (not least or math.abs(number) < least) then
      first, least = entries[n], math.abs(number)
    end
  end
  return total, first
end

-- Queue a task with `command`, LPUSH or RPUSH, or let it wait if its gate is closed.
local function enqueue(name, id, command)
  local kind = kind_of(id)
  if is_closed(name, kind) then
    redis.call('HSET', task(id), 'status', 'deferred')
    redis.call('RPUSH', waiting(name, kind), id)
  else
    redis.call('HSET', task(id), 'status', 'queued')
    redis.call(command, queue(name), id)
  end
end

-- Delete all keys of a task.
local function delete_task(id)
  redis.call('DEL', task(id), 'rq:executions:' .. id, 'rq:results:' .. id)
end

-- Create a queue unless it exists.
local function create_queue(name, job)
  redis.call('SADD', 'rq:queues', queue(name))
  redis.call('ZADD', ORDER, 'NX', clock(), name)
  redis.call('HSET', JOBS, name, job)
end

-- Delete all keys of a queue without tasks.
local function delete_if_empty(name)
  local total = redis.call('LLEN', queue(name)) + redis.call('ZCARD', started(name))
    + redis.call('ZCARD', failed(name)) + count_waiting(name)
  if total == 0 then
    redis.call('ZREM', ORDER, name)
    redis.call('HDEL', JOBS, name)
    redis.call('SREM', 'rq:queues', queue(name))
    redis.call('DEL', contributions(name), gates(name), 'rq:workers:' .. name)
  end
end

-- End one attempt. Return false, and change nothing, if it has already ended.
local function end_attempt(name, id, attempt)
  if redis.call('ZREM', started(name), id .. ':' .. attempt) == 0 then return false end
  redis.call('DEL', 'rq:execution:' .. id .. ':' .. attempt)
  redis.call('ZREM', 'rq:executions:' .. id, attempt)
  return true
end

-- Record that a worker renews its leases now. Only RQ's entry of the worker is written, if it exists.
local function record_renewal(worker, now, lease)
  local key = 'rq:worker:' .. worker
  if redis.call('EXISTS', key) == 1 then
    redis.call('HSET', key, 'chunkq_renewal', now .. ' ' .. lease)
  end
end

-- Return whether the worker of a lease that ended at `stop` has renewed others since, so that it did
-- not hold this one: the server lost an acknowledgement in a failover, or the answer with the lease.
local function was_lost(id, stop)
  local worker = redis.call('HGET', task(id), 'worker_name') or ''
  local renewal = redis.call('HGET', 'rq:worker:' .. worker, 'chunkq_renewal') or ''
  local time, lease = renewal:match('^(%S+) (%S+)$')
  if not time then return false end
  local last = stop - tonumber(lease)
  -- A lease of the same moment may have been made while the renewal was on its way.
  return tonumber(time) - last > tonumber(lease) / 6
end

-- Queue a task after an unsuccessful attempt, or fail it after its last one. If the attempt does
-- not count, the task goes first; otherwise last, because a temporary cause may be over by then.
local function requeue(name, id, counted, stamp)
  local key = task(id)
  if redis.call('EXISTS', key) == 0 then return end
  local retries = tonumber(redis.call('HGET', key, 'retries_left')) or 0
  if not counted then
    enqueue(name, id, 'LPUSH')
  elseif retries > 0 then
    redis.call('HSET', key, 'retries_left', retries - 1)
    enqueue(name, id, 'RPUSH')
  else
    redis.call('HSET', key, 'status', 'failed', 'ended_at', stamp)
    redis.call('ZADD', failed(name), -1, id)
  end
end
