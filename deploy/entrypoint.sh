#!/bin/bash
# Entry point of the containers: the first argument is the role. A role without its secret fails with one line.
# Each role replaces this shell, so that signals reach it: a trainer then finishes its update and writes a checkpoint.
set -euo pipefail

RAYLET_PORT=${ANCHORAGE_RAYLET_PORT:-6380}

fail() {
  echo "anchorage: $1" >&2
  exit 2
}

# Export secret $1 from its variable, or from the file named by $1_FILE.
need() {
  local file="$1_FILE" value="${!1:-}"
  if [ -z "$value" ] && [ -n "${!file:-}" ]; then
    value=$(cat "${!file}" 2>/dev/null) || fail "cannot read ${!file} ($file)"
  fi
  [ -n "$value" ] || fail "$1 is not set: run make secrets, or set $file to the name of its file"
  unset "$file"
  export "$1=$value"
}

need_redis() {
  [ -n "${REDIS_URL:-}" ] && return
  need ANCHORAGE_REDIS_PASSWORD
  export REDIS_URL="redis://:$ANCHORAGE_REDIS_PASSWORD@${ANCHORAGE_REDIS_HOST:-redis:6379}/0"
  unset ANCHORAGE_REDIS_PASSWORD
}

# The address under which the other nodes reach this one. With the host's network there are several to choose from.
own_address() {
  if [ -n "${ANCHORAGE_NODE_ADDRESS:-}" ]; then
    echo "$ANCHORAGE_NODE_ADDRESS"
  else
    hostname -I | cut -d ' ' -f 1
  fi
}

# Set the array `start` to the `ray start` command of a node. The cluster accepts nodes that have its token.
ray_node() {
  need RAY_AUTH_TOKEN
  export RAY_AUTH_MODE=token
  start=(ray start --disable-usage-stats --node-ip-address "$(own_address)" --node-manager-port "$RAYLET_PORT"
    --object-store-memory "${ANCHORAGE_OBJECT_STORE_BYTES:-268435456}" --num-cpus "${ANCHORAGE_NODE_CPUS:-1}")
}

# The same for a node that joins the head at RAY_ADDRESS; waits until the head accepts connections.
ray_worker() {
  ray_node
  [ -n "${RAY_ADDRESS:-}" ] || fail "RAY_ADDRESS is not set: set it to the address of the Ray head, such as head:6379"
  start+=(--address "$RAY_ADDRESS")
  for _ in $(seq 60); do
    (: <"/dev/tcp/${RAY_ADDRESS%:*}/${RAY_ADDRESS##*:}") 2>/dev/null && return
    sleep 2
  done
  fail "no Ray head at $RAY_ADDRESS within 120 s"
}

# Offer places of kind $1 and the cards of this container: $2 places, or where $2 is empty one for each $3 cards. Fails
# with one line if the driver is too old, no card is visible, or a card is in use by another container.
offer() {
  local offered
  offered=$(python -m anchorage.checks.cards "$1" --places "$2" --per-place "$3" --head "$RAY_ADDRESS") || exit 2
  start+=(--resources "$offered")
}

role=${1:-}
shift || true
case "$role" in
  head)
    ray_node
    exec "${start[@]}" --head --port "${ANCHORAGE_HEAD_PORT:-6379}" --include-dashboard false --block
    ;;
  actor)
    ray_worker
    offer rollout "${ANCHORAGE_ROLLOUT_PLACES:-}" "${ANCHORAGE_TENSOR_PARALLEL:-1}"
    exec "${start[@]}" --block
    ;;
  learner)
    ray_worker
    offer learner "${ANCHORAGE_LEARNER_PLACES:-}" 1
    exec "${start[@]}" --block
    ;;
  trainer)
    need_redis
    need ANCHORAGE_ENV_TOKEN
    ray_worker
    "${start[@]}"
    exec anchorage train "$@"
    ;;
  control)
    need_redis
    need ANCHORAGE_ENV_TOKEN
    need ANCHORAGE_CONTROL_READ_TOKEN
    need ANCHORAGE_CONTROL_ADMIN_TOKEN
    exec anchorage control runs --host 0.0.0.0 --port 8080 "$@"
    ;;
  environment)
    need ANCHORAGE_ENV_TOKEN
    # Official data, if a folder is mounted at /data; otherwise tasks are generated.
    [ -z "$(ls /data 2>/dev/null)" ] || export ALFWORLD_DATA=/data WEBSHOP_DATA=/data
    exec python -m env_servers "$@" --host 0.0.0.0 --port 8001
    ;;
  healthy)
    if [ "$1" = ray ]; then
      exec 3<>"/dev/tcp/$(own_address)/$RAYLET_PORT"
    else
      exec python -c 'import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=4)' "$1"
    fi
    ;;
  *)
    exec "$role" "$@"
    ;;
esac
