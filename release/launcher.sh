#!/bin/sh
# The CLI of an installed release: the pinned Node beside this package runs the bundle. `exec`, so that the pid a caller
# gets is the daemon's.
# Few other programs are run on the usual way: each costs as long as the kernel needs for a fork.
set -eu
package=$(readlink -f -- "$0")
package=${package%/*/*}
machine=
if [ -r /proc/sys/kernel/arch ]; then read -r machine </proc/sys/kernel/arch; else machine=$(uname -m); fi
case $machine in
  x86_64) arch=x64 ;;
  aarch64 | arm64) arch=arm64 ;;
  *)
    echo "atoll: this machine is a $machine; Atoll runs on x86_64 and aarch64 Linux." >&2
    exit 1
    ;;
esac

# Where npm put a dependency: inside this package, or beside it or one of the folders above. The answer is in `found`.
find_module() {
  folder=$package
  while :; do
    if [ -e "$folder/node_modules/$1" ]; then
      found=$folder/node_modules/$1
      return
    fi
    if [ "$folder" = / ]; then
      echo "atoll: the package ${1%%/*} is missing: install atoll again, with its optional dependencies." >&2
      exit 1
    fi
    folder=${folder%/*}
    folder=${folder:-/}
  done
}

find_module "node-linux-$arch/bin/node"
node=$found
find_module "atoll-native-linux-$arch/atoll.node"
ATOLL_ADDON=$found
export ATOLL_ADDON
if [ -z "${ATOLL_HOME:-}" ]; then
  # Not inside the package, which an update replaces.
  if [ "$(id -u)" = 0 ]; then ATOLL_HOME=/var/lib/atoll; else ATOLL_HOME=${XDG_DATA_HOME:-$HOME/.local/share}/atoll; fi
  export ATOLL_HOME
fi
exec "$node" --max-semi-space-size=4 "$package/lib/atoll/start.cjs" "$@"
