-- Close a gate; look at queued tasks from the head of the queue: those of the kind wait from now on,
-- others are queued last. Return how many tasks are queued.
-- ARGV: queue name, kind, number of tasks to look at.
local name, kind, last = ARGV[1], ARGV[2], 0
allow_when_full()
local entries = redis.call('ZRANGE', gates(name), 0, -1, 'WITHSCORES')
for n = 2, #entries, 2 do last = math.max(last, math.abs(tonumber(entries[n]))) end
local number = tonumber(redis.call('ZSCORE', gates(name), kind) or last + 1)
redis.call('ZADD', gates(name), math.abs(number), kind)
for _ = 1, tonumber(ARGV[3]) do
  local id = redis.call('LPOP', queue(name))
  if not id then break end
  if redis.call('HGET', task(id), 'status') == 'queued' then enqueue(name, id, 'RPUSH') end
end
return redis.call('LLEN', queue(name))
