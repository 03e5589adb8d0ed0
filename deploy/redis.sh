#!/bin/sh
# redis-server as a run needs it: append-only file, nothing evicted, behind a password. `healthy` asks it.
set -eu
if [ -n "${ANCHORAGE_REDIS_PASSWORD_FILE:-}" ]; then ANCHORAGE_REDIS_PASSWORD=$(cat "$ANCHORAGE_REDIS_PASSWORD_FILE"); fi
if [ -z "${ANCHORAGE_REDIS_PASSWORD:-}" ]; then
  echo "anchorage: ANCHORAGE_REDIS_PASSWORD is not set: make secrets makes it (or name its file in …_FILE)" >&2
  exit 2
fi
if [ "${1:-}" = healthy ]; then
  export REDISCLI_AUTH="$ANCHORAGE_REDIS_PASSWORD"
  [ "$(redis-cli --no-auth-warning ping)" = PONG ]
  exit
fi
exec redis-server - <<SETTINGS
bind 0.0.0.0
requirepass $ANCHORAGE_REDIS_PASSWORD
dir /var/lib/anchorage-redis
save ""
appendonly yes
appendfsync everysec
maxmemory ${ANCHORAGE_REDIS_MAXMEMORY:-3gb}
maxmemory-policy noeviction
SETTINGS
