-- Return 1 if no task is queued or running, else 0. ARGV: arguments of `selected_queues`.
for _, name in ipairs(selected_queues(ARGV[1], 2)) do
  if redis.call('LLEN', queue(name)) + redis.call('ZCARD', started(name)) > 0 then return 0 end
end
return 1
