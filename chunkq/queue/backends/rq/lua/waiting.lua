-- Return job and first waiting kind of each queue whose tasks only wait.
-- ARGV: arguments of `selected_queues`.
local found = {}
for _, name in ipairs(selected_queues(ARGV[1], 2)) do
  if redis.call('LLEN', queue(name)) + redis.call('ZCARD', started(name)) == 0 then
    local _, kind = count_waiting(name)
    if kind then
      found[#found + 1] = redis.call('HGET', JOBS, name)
      found[#found + 1] = kind
    end
  end
end
return found
