-- Return queued, running and failed; what lost its lease waits again. ARGV: queue name.
local name, now = ARGV[1], clock()
local lost = redis.call('ZCOUNT', started(name), 0, now)
return {
  redis.call('LLEN', queue(name)) + lost,
  redis.call('ZCARD', started(name)) - lost,
  redis.call('ZCARD', failed(name)),
}
