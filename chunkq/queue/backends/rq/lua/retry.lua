-- Queue failed tasks with all their attempts; return how many.
-- ARGV: queue name, maximum number of attempts, maximum number of tasks.
local name, moved = ARGV[1], 0
for _, id in ipairs(redis.call('ZRANGE', failed(name), 0, tonumber(ARGV[3]) - 1)) do
  redis.call('ZREM', failed(name), id)
  if redis.call('EXISTS', task(id)) == 1 then
    redis.call('HSET', task(id), 'retries_left', tonumber(ARGV[2]) - 1)
    redis.call('DEL', 'rq:results:' .. id)
    enqueue(name, id, 'RPUSH')
    moved = moved + 1
  end
end
return moved
