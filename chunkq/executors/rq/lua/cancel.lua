-- Forget some tasks of a job, queued, failed and running ones; returns how many, 0 at the end.
-- ARGV: queue name, most at a time.
local name, most, gone = ARGV[1], tonumber(ARGV[2]), 0
while gone < most do
  local id = redis.call('LPOP', queue(name))
  if not id then break end
  forget(id)
  gone = gone + 1
end
if gone < most then
  for _, id in ipairs(redis.call('ZRANGE', failed(name), 0, most - gone - 1)) do
    redis.call('ZREM', failed(name), id)
    forget(id)
    gone = gone + 1
  end
end
if gone < most then
  for _, entry in ipairs(redis.call('ZRANGE', started(name), 0, -1)) do
    local id, attempt = entry:match('^(.*):(.-)$')
    end_attempt(name, id, attempt)
    forget(id)
    gone = gone + 1
  end
end
redis.call('DEL', blocks(name))
forget_if_empty(name)
return gone
