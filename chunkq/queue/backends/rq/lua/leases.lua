-- Return queue, id and attempt of every lease of a worker. ARGV: worker.
local leases = {}
for _, name in ipairs(redis.call('ZRANGE', ORDER, 0, -1)) do
  for _, entry in ipairs(redis.call('ZRANGE', started(name), 0, -1)) do
    if redis.call('HGET', 'rq:execution:' .. entry, 'worker_name') == ARGV[1] then
      local id, attempt = entry:match('^(.*):(.-)$')
      leases[#leases + 1] = name
      leases[#leases + 1] = id
      leases[#leases + 1] = attempt
    end
  end
end
return leases
