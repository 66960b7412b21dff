-- Return the numbers of queued, running, failed and waiting tasks. A task with an expired lease is
-- queued, or waiting if its gate is closed.
-- ARGV: queue name.
local name, now = ARGV[1], clock()
local expired = redis.call('ZCOUNT', started(name), 0, now)
local waiting_tasks, behind_gates = count_waiting(name), 0
if redis.call('EXISTS', gates(name)) == 1 then
  for _, entry in ipairs(redis.call('ZRANGEBYSCORE', started(name), 0, now)) do
    if is_closed(name, kind_of(entry)) then behind_gates = behind_gates + 1 end
  end
end
return {
  redis.call('LLEN', queue(name)) + expired - behind_gates,
  redis.call('ZCARD', started(name)) - expired,
  redis.call('ZCARD', failed(name)),
  waiting_tasks + behind_gates,
}
