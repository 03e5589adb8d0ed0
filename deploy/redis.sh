#!/bin/sh
# redis-server with the settings that a run needs: append-only file, no eviction, password. `healthy` checks it.
# Data that a power cut or a disk damaged are moved to damaged-<time>, never deleted. The server starts with their
# intact part, or without data; a run plays again what is missing.
set -eu
data=${ANCHORAGE_REDIS_DATA:-/var/lib/anchorage-redis}
if [ -n "${ANCHORAGE_REDIS_PASSWORD_FILE:-}" ]; then ANCHORAGE_REDIS_PASSWORD=$(cat "$ANCHORAGE_REDIS_PASSWORD_FILE"); fi
if [ -z "${ANCHORAGE_REDIS_PASSWORD:-}" ]; then
  echo "anchorage: ANCHORAGE_REDIS_PASSWORD is not set: run make secrets, or set ANCHORAGE_REDIS_PASSWORD_FILE" >&2
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
  # If there is no space for a copy, or truncation does not repair the file, all data are moved.
  if cp -R "$parts" "$aside/" && { yes | redis-check-aof --fix "$manifest" >/dev/null 2>&1; } && sound; then
    echo "anchorage: the append-only file was damaged: copied to $aside and truncated; the rest is played again" >&2
  else
    mkdir "$aside/rest"
    mv "$parts" "$aside/rest/"
    echo "anchorage: the append-only file was damaged: moved to $aside; starting without data, all is played again" >&2
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
