-- Delete tasks of a job; return how many, 0 when none remain. Gates are deleted with the last one.
-- ARGV: queue name, maximum number of tasks that are not running.
local name, limit, deleted = ARGV[1], tonumber(ARGV[2]), 0
while deleted < limit do
  local id = redis.call('LPOP', queue(name))
  if not id then break end
  delete_task(id)
  deleted = deleted + 1
end
for _, kind in ipairs(redis.call('ZRANGE', gates(name), 0, -1)) do
  while deleted < limit do
    local id = redis.call('LPOP', waiting(name, kind))
    if not id then break end
    delete_task(id)
    deleted = deleted + 1
  end
end
if deleted < limit then
  for _, id in ipairs(redis.call('ZRANGE', failed(name), 0, limit - deleted - 1)) do
    redis.call('ZREM', failed(name), id)
    delete_task(id)
    deleted = deleted + 1
  end
end
if deleted < limit then
  for _, entry in ipairs(redis.call('ZRANGE', started(name), 0, -1)) do
    local id, attempt = entry:match('^(.*):(.-)$')
    end_attempt(name, id, attempt)
    delete_task(id)
    deleted = deleted + 1
  end
end
redis.call('DEL', contributions(name))
delete_if_empty(name)
return deleted
