#!/bin/sh
# `npm test`: sets up what is missing, then runs every check and test that this machine can run.
set -eu
root=$(cd "$(dirname -- "$0")/.." && pwd)
sh "$root/scripts/setup.sh"
cd "$root"
exec node_modules/.bin/node scripts/test.ts "$@"
