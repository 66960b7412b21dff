-- What RQ 2.12 keeps where, and chunkq's own two keys: which RQ queue holds which job's tasks.
-- Every script runs as a whole or not at all, so a process killed at any moment loses nothing.
local ORDER, JOBS = 'chunkq:queues', 'chunkq:jobs'
local function queue(name) return 'rq:queue:' .. name end
local function started(name) return 'rq:wip:' .. name end
local function failed(name) return 'rq:failed:' .. name end
local function blocks(name) return 'chunkq:blocks:' .. name end
local function task(id) return 'rq:job:' .. id end

-- The server's clock (s, Unix): those of the workers may differ.
local function clock()
  local time = redis.call('TIME')
  return tonumber(time[1]) + tonumber(time[2]) / 1000000
end

-- A full Redis refuses what stores, unless the script has changed something before. Working off
-- what is queued makes room, so workers' scripts begin with this.
local function begin() redis.call('DEL', 'chunkq:nothing') end

-- Note that a worker is here; returns until when no lease ends. Nobody can have renewed one while
-- the server was away: after that all get one more lease's time.
local function grace_until(now, lease)
  local seen = tonumber(redis.call('GET', 'chunkq:seen') or now)
  if seen == now or math.abs(now - seen) > lease / 20 then redis.call('SET', 'chunkq:seen', now) end
  if now - seen > lease / 2 then redis.call('SET', 'chunkq:grace', now + lease) end
  return tonumber(redis.call('GET', 'chunkq:grace') or 0)
end

-- The queues a shift works on, the oldest job's first: `only` these, or all `except` these.
local function chosen(mode, first)
  local names = {}
  for n = first, #ARGV do names[#names + 1] = ARGV[n] end
  if mode == 'only' then return names end
  local aside, left = {}, {}
  for _, name in ipairs(names) do aside[name] = true end
  for _, name in ipairs(redis.call('ZRANGE', ORDER, 0, -1)) do
    if not aside[name] then left[#left + 1] = name end
  end
  return left
end

-- Forget a task altogether.
local function forget(id)
  redis.call('DEL', task(id), 'rq:executions:' .. id, 'rq:results:' .. id)
end

local function forget_if_empty(name)
  local left = redis.call('LLEN', queue(name)) + redis.call('ZCARD', started(name))
    + redis.call('ZCARD', failed(name))
  if left == 0 then
    redis.call('ZREM', ORDER, name)
    redis.call('HDEL', JOBS, name)
    redis.call('SREM', 'rq:queues', queue(name))
    redis.call('DEL', blocks(name), 'rq:workers:' .. name)
  end
end

-- End one attempt; false if it has ended before, so that whoever comes late changes nothing.
local function end_attempt(name, id, attempt)
  if redis.call('ZREM', started(name), id .. ':' .. attempt) == 0 then return false end
  redis.call('DEL', 'rq:execution:' .. id .. ':' .. attempt)
  redis.call('ZREM', 'rq:executions:' .. id, attempt)
  return true
end

-- Queue a task whose attempt ended without success: uncounted, first in line; counted, behind
-- all others, since what was amiss may have passed by then. After the last attempt it is failed.
local function put_back(name, id, counted, stamp)
  local key = task(id)
  if redis.call('EXISTS', key) == 0 then return end
  local left = tonumber(redis.call('HGET', key, 'retries_left')) or 0
  if not counted then
    redis.call('HSET', key, 'status', 'queued')
    redis.call('LPUSH', queue(name), id)
  elseif left > 0 then
    redis.call('HSET', key, 'status', 'queued', 'retries_left', left - 1)
    redis.call('RPUSH', queue(name), id)
  else
    redis.call('HSET', key, 'status', 'failed', 'ended_at', stamp)
    redis.call('ZADD', failed(name), -1, id)
  end
end
