-- Open a gate and queue waiting tasks of its kind; return how many, 0 when none remain.
-- ARGV: queue name, kind, maximum number of tasks.
local name, kind, moved = ARGV[1], ARGV[2], 0
allow_when_full()
local number = redis.call('ZSCORE', gates(name), kind)
if not number then return 0 end
redis.call('ZADD', gates(name), -math.abs(tonumber(number)), kind)
while moved < tonumber(ARGV[3]) do
  local id = redis.call('LPOP', waiting(name, kind))
  if not id then break end
  if redis.call('HGET', task(id), 'status') == 'deferred' then enqueue(name, id, 'RPUSH') end
  moved = moved + 1
end
if redis.call('LLEN', waiting(name, kind)) == 0 then
  redis.call('ZREM', gates(name), kind)
  delete_if_empty(name)
end
return moved
