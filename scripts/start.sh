#!/bin/sh
# `npm start`: sets up what is missing, then becomes the daemon.
set -eu
root=$(cd "$(dirname -- "$0")/.." && pwd)
sh "$root/scripts/setup.sh"
exec "$root/atoll" serve "$@"
