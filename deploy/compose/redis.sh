#!/bin/sh
# Starts Redis with the shipped settings and the secret's password; with `ping`, asks whether it
# answers. No command line ever holds the password.
set -eu
secret=/run/secrets/redis_password

if [ "${1:-}" = ping ]; then
  REDISCLI_AUTH=$(tr -d '\r\n' <"$secret")
  export REDISCLI_AUTH
  [ "$(redis-cli ping)" = PONG ]
  exit
fi

if [ ! -r "$secret" ]; then
  echo "the secret's file cannot be read: chmod 644 it, and 700 its folder" >&2
  exit 1
fi
if [ -z "$(tr -d '\r\n' <"$secret")" ]; then
  echo "the secret redis_password is empty" >&2
  exit 1
fi
hash=$(tr -d '\r\n' <"$secret" | sha256sum | cut -d ' ' -f 1)
exec redis-server - <<END
$(cat /etc/chunkq/redis.conf)
dir /data
user default on #$hash $(grep -v '^#' /etc/chunkq/redis.acl)
END
