#!/bin/sh
# Start Redis with redis.conf and the password in the secret. With the argument `ping`, check that
# Redis responds. The password is never in a command line.
set -eu
secret=/run/secrets/redis_password

if [ "${1:-}" = ping ]; then
  REDISCLI_AUTH=$(tr -d '\r\n' <"$secret")
  export REDISCLI_AUTH
  [ "$(redis-cli ping)" = PONG ]
  exit
fi

if [ ! -r "$secret" ]; then
  echo "redis_password: cannot read the secret; run chmod 644 on its file, 700 on its folder" >&2
  exit 1
fi
if [ -z "$(tr -d '\r\n' <"$secret")" ]; then
  echo "redis_password: the secret is empty; write a password into its file" >&2
  exit 1
fi
hash=$(tr -d '\r\n' <"$secret" | sha256sum | cut -d ' ' -f 1)
exec redis-server - <<END
$(cat /etc/chunkq/redis.conf)
dir /data
user default on #$hash $(grep -v '^#' /etc/chunkq/redis.acl)
END
