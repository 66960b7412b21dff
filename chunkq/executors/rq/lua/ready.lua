-- Change nothing, but only where a worker's scripts may change something.
begin()
return 1
