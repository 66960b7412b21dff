-- Tell (1 or 0) whether nothing is queued or running. ARGV: mode and names as `chosen` takes them.
for _, name in ipairs(chosen(ARGV[1], 2)) do
  if redis.call('LLEN', queue(name)) + redis.call('ZCARD', started(name)) > 0 then return 0 end
end
return 1
