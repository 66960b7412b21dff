-- Return queue, id and attempt of everything that a worker holds. ARGV: worker.
local found = {}
for _, name in ipairs(redis.call('ZRANGE', ORDER, 0, -1)) do
  for _, entry in ipairs(redis.call('ZRANGE', started(name), 0, -1)) do
    if redis.call('HGET', 'rq:execution:' .. entry, 'worker_name') == ARGV[1] then
      local id, attempt = entry:match('^(.*):(.-)$')
      found[#found + 1] = name
      found[#found + 1] = id
      found[#found + 1] = attempt
    end
  end
end
return found
