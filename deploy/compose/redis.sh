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
password=$(sed 's/[\\"]/\\&/g' "$secret" | tr -d '\r\n')
if [ -z "$password" ]; then
  echo "the secret redis_password is empty" >&2
  exit 1
fi
exec redis-server - <<END
$(cat /etc/chunkq/redis.conf)
dir /data
requirepass "$password"
END
