-- Return the numbers of queued, running and failed tasks. A task with an expired lease is queued.
-- ARGV: queue name.
local name, now = ARGV[1], clock()
local expired = redis.call('ZCOUNT', started(name), 0, now)
return {
  redis.call('LLEN', queue(name)) + expired,
  redis.call('ZCARD', started(name)) - expired,
  redis.call('ZCARD', failed(name)),
}
