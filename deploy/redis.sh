#!/bin/sh
# redis-server as a run needs it: append-only file, nothing evicted, behind a password. `healthy` asks it.
# Data damaged by a power cut or a disk are set aside in damaged-<time>, never deleted; the server starts with what of them
# is sound, or with none: a run plays again what is missing.
set -eu
data=${ANCHORAGE_REDIS_DATA:-/var/lib/anchorage-redis}
if [ -n "${ANCHORAGE_REDIS_PASSWORD_FILE:-}" ]; then ANCHORAGE_REDIS_PASSWORD=$(cat "$ANCHORAGE_REDIS_PASSWORD_FILE"); fi
if [ -z "${ANCHORAGE_REDIS_PASSWORD:-}" ]; then
  echo "anchorage: ANCHORAGE_REDIS_PASSWORD is not set: make secrets makes it (or name its file in …_FILE)" >&2
  exit 2
fi
if [ "${1:-}" = healthy ]; then
  export REDISCLI_AUTH="$ANCHORAGE_REDIS_PASSWORD"
  [ "$(redis-cli --no-auth-warning -p "${ANCHORAGE_REDIS_PORT:-6379}" ping)" = PONG ]
  exit
fi

parts=$data/appendonlydir
manifest=$parts/appendonly.aof.manifest
sound() {
  grep -q "^file " "$manifest" 2>/dev/null && redis-check-aof "$manifest" >/dev/null 2>&1
}
if command -v redis-check-aof >/dev/null && [ -n "$(ls -A "$parts" 2>/dev/null)" ] && ! sound; then
  aside=$data/damaged-$(date -u +%Y%m%dT%H%M%SZ)-$$
  mkdir "$aside"
  # Without room for a copy, or where cutting the end off does not help, everything goes.
  if cp -R "$parts" "$aside/" && { yes | redis-check-aof --fix "$manifest" >/dev/null 2>&1; } && sound; then
    echo "anchorage: the append-only file was damaged: set aside in $aside, its end is cut off and played again" >&2
  else
    mkdir "$aside/rest"
    mv "$parts" "$aside/rest/"
    echo "anchorage: the append-only file was damaged: set aside in $aside, starting without data; all is played again" >&2
  fi
fi
exec redis-server - <<SETTINGS
bind 0.0.0.0
port ${ANCHORAGE_REDIS_PORT:-6379}
requirepass $ANCHORAGE_REDIS_PASSWORD
dir $data
save ""
appendonly yes
appendfsync everysec
maxmemory ${ANCHORAGE_REDIS_MAXMEMORY:-3gb}
maxmemory-policy noeviction
SETTINGS
