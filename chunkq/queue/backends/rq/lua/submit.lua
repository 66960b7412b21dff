-- Queue the tasks of one job that are neither queued, waiting nor running; return how many are new,
-- how many are queued or waiting in total, and the ids of the others.
-- ARGV: queue name, job, stamp, maximum number of attempts, then id and message of each task.
local name, job, stamp, retries = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]) - 1
local has_gates, closed, count = redis.call('EXISTS', gates(name)) == 1, {}, 0
local lists, others = {}, {}
for n = 5, #ARGV, 2 do
  local id, key = ARGV[n], task(ARGV[n])
  local status = redis.call('HGET', key, 'status')
  if status ~= 'queued' and status ~= 'started' and status ~= 'deferred' then
    if status then
      redis.call('ZREM', failed(name), id)
      delete_task(id)
    end
    local new_status, list = 'queued', queue(name)
    if has_gates then
      local kind = kind_of(id)
      if closed[kind] == nil then closed[kind] = is_closed(name, kind) end
      if closed[kind] then new_status, list = 'deferred', waiting(name, kind) end
    end
    redis.call('HSET', key, 'status', new_status, 'created_at', stamp, 'enqueued_at', stamp,
      'origin', name, 'data', ARGV[n + 1], 'retries_left', retries, 'timeout', -1,
      'result_ttl', 0, 'failure_ttl', -1)
    local ids = lists[list]
    if not ids then
      ids = {}
      lists[list] = ids
    end
    ids[#ids + 1] = id
    count = count + 1
  else
    others[#others + 1] = id
  end
end
for list, ids in pairs(lists) do
  for first = 1, #ids, 1000 do
    redis.call('RPUSH', list, unpack(ids, first, math.min(first + 999, #ids)))
  end
end
if count > 0 then create_queue(name, job) end
return {count, redis.call('LLEN', queue(name)) + count_waiting(name), others}
