-- Extend leases of a worker that have not ended. ARGV: lease (s), worker, then queue, id and attempt of
-- each task.
local lease, now = tonumber(ARGV[1]), clock()
allow_when_full()
grace_until(now, lease)
record_renewal(ARGV[2], now, lease)
for n = 3, #ARGV, 3 do
  local name, id, attempt = ARGV[n], ARGV[n + 1], ARGV[n + 2]
  local entry = id .. ':' .. attempt
  if redis.call('ZSCORE', started(name), entry) then
    redis.call('ZADD', started(name), now + lease, entry)
    redis.call('HSET', 'rq:execution:' .. entry, 'last_heartbeat', now)
    redis.call('EXPIRE', 'rq:execution:' .. entry, math.ceil(lease) + 60)
    redis.call('ZADD', 'rq:executions:' .. id, now + lease + 60, attempt)
  end
end
