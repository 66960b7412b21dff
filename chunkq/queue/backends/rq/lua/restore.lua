-- Queue tasks whose list is lost; return how many. A task that is queued twice runs once. The entry of
-- the queue itself is created again. ARGV: queue name, job, then the id of each task.
local name, running, count = ARGV[1], {}, 0
create_queue(name, ARGV[2])
for _, entry in ipairs(redis.call('ZRANGE', started(name), 0, -1)) do
  running[entry:match('^(.*):.-$')] = true
end
for n = 3, #ARGV do
  local id = ARGV[n]
  if redis.call('EXISTS', task(id)) == 1 and not running[id] then
    enqueue(name, id, 'RPUSH')
    count = count + 1
  end
end
return count
