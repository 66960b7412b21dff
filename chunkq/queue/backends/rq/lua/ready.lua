-- Return 1, or raise an error if the scripts of workers may not write. Changes nothing.
allow_when_full()
return 1
