-- Keys of RQ 2.12, and the two keys of chunkq: ORDER ranks the queues by the time of their first
-- task, JOBS maps a queue to its job. Every script is atomic, so a killed process loses nothing.
local ORDER, JOBS = 'chunkq:queues', 'chunkq:jobs'
local function queue(name) return 'rq:queue:' .. name end
local function started(name) return 'rq:wip:' .. name end
local function failed(name) return 'rq:failed:' .. name end
local function blocks(name) return 'chunkq:blocks:' .. name end
local function task(id) return 'rq:job:' .. id end

-- Return the time of the server (s, Unix). The clocks of workers may differ.
local function clock()
  local time = redis.call('TIME')
  return tonumber(time[1]) + tonumber(time[2]) / 1000000
end

-- Allow the script to write to a full Redis, which rejects writes unless the script has already
-- changed something. The scripts of workers call this first, because running tasks frees memory.
local function allow_when_full() redis.call('DEL', 'chunkq:nothing') end

-- Record a request of a worker; return the time until which leases do not expire. While the server
-- was unreachable no lease could be renewed, so after an outage all leases are extended once.
local function grace_until(now, lease)
  local seen = tonumber(redis.call('GET', 'chunkq:seen') or now)
  if seen == now or math.abs(now - seen) > lease / 20 then redis.call('SET', 'chunkq:seen', now) end
  if now - seen > lease / 2 then redis.call('SET', 'chunkq:grace', now + lease) end
  return tonumber(redis.call('GET', 'chunkq:grace') or 0)
end

-- Return the queues that a worker reserves tasks from, ordered by job age. Mode 'only' selects the
-- queues in ARGV from index `first`, 'except' all others.
local function selected_queues(mode, first)
  local names = {}
  for n = first, #ARGV do names[#names + 1] = ARGV[n] end
  if mode == 'only' then return names end
  local skipped, selected = {}, {}
  for _, name in ipairs(names) do skipped[name] = true end
  for _, name in ipairs(redis.call('ZRANGE', ORDER, 0, -1)) do
    if not skipped[name] then selected[#selected + 1] = name end
  end
  return selected
end

-- Delete all keys of a task.
local function delete_task(id)
  redis.call('DEL', task(id), 'rq:executions:' .. id, 'rq:results:' .. id)
end

-- Delete all keys of a queue without tasks.
local function delete_if_empty(name)
  local total = redis.call('LLEN', queue(name)) + redis.call('ZCARD', started(name))
    + redis.call('ZCARD', failed(name))
  if total == 0 then
    redis.call('ZREM', ORDER, name)
    redis.call('HDEL', JOBS, name)
    redis.call('SREM', 'rq:queues', queue(name))
    redis.call('DEL', blocks(name), 'rq:workers:' .. name)
  end
end

-- End one attempt. Return false, and change nothing, if it has already ended.
local function end_attempt(name, id, attempt)
  if redis.call('ZREM', started(name), id .. ':' .. attempt) == 0 then return false end
  redis.call('DEL', 'rq:execution:' .. id .. ':' .. attempt)
  redis.call('ZREM', 'rq:executions:' .. id, attempt)
  return true
end

-- Queue a task after an unsuccessful attempt, or fail it after its last one. If the attempt does
-- not count, the task goes first; otherwise last, because a temporary cause may be over by then.
local function requeue(name, id, counted, stamp)
  local key = task(id)
  if redis.call('EXISTS', key) == 0 then return end
  local retries = tonumber(redis.call('HGET', key, 'retries_left')) or 0
  if not counted then
    redis.call('HSET', key, 'status', 'queued')
    redis.call('LPUSH', queue(name), id)
  elseif retries > 0 then
    redis.call('HSET', key, 'status', 'queued', 'retries_left', retries - 1)
    redis.call('RPUSH', queue(name), id)
  else
    redis.call('HSET', key, 'status', 'failed', 'ended_at', stamp)
    redis.call('ZADD', failed(name), -1, id)
  end
end
