#!/bin/sh
# Write the secrets of a cluster to files of variables, for docker-compose. Existing files are kept.
#   deploy/secrets.sh [FOLDER]     (default deploy/secrets)
set -eu
umask 077
folder=${1:-"$(dirname "$0")/secrets"}
mkdir -p "$folder"

# write FILE VARIABLE…: set each variable to 32 random bytes, in hexadecimal.
write() {
  file="$folder/$1.env"
  shift
  if [ -e "$file" ]; then return; fi
  for name in "$@"; do
    echo "$name=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')"
  done >"$file.partial"
  mv "$file.partial" "$file"
  echo "$file"
}

write redis ANCHORAGE_REDIS_PASSWORD
write ray RAY_AUTH_TOKEN
write environment ANCHORAGE_ENV_TOKEN
write control ANCHORAGE_CONTROL_READ_TOKEN ANCHORAGE_CONTROL_ADMIN_TOKEN
write grafana GF_SECURITY_ADMIN_PASSWORD
