#!/bin/sh
# Installs the packages and builds the native addon, whatever of it is missing or out of date; silent and quick otherwise.
set -eu
cd "$(dirname -- "$0")/.."

say() { printf 'atoll: %s\n' "$*" >&2; }
fail() {
  say "$*"
  exit 1
}

[ "$(uname -s)" = Linux ] || fail "Atoll runs on Linux; this is $(uname -s)."
case $(uname -m) in
  x86_64) arch=x64 ;;
  aarch64 | arm64) arch=arm64 ;;
  *) fail "Atoll runs on x86_64 and aarch64; this machine is a $(uname -m)." ;;
esac
command -v node >/dev/null 2>&1 || fail "node is not on the PATH: install Node.js 20 or newer (with npm), then run this again."
command -v npm >/dev/null 2>&1 || fail "npm is not on the PATH: install it (Debian: apt-get install npm), then run this again."

# Inside an npm script the PATH starts with node_modules/.bin, whose `node` is the one that `npm ci` is about to remove:
# the outer npm's own Node runs the inner one.
npm_ci() {
  case ${npm_execpath:-} in
    *npm-cli.js) "${npm_node_execpath:-node}" "$npm_execpath" ci "$@" ;;
    *) npm ci "$@" ;;
  esac
}

# npm writes node_modules/.package-lock.json last, so its age tells whether the installation is whole and current.
if [ ! -e node_modules/.package-lock.json ] || [ package-lock.json -nt node_modules/.package-lock.json ]; then
  say "installing the packages of package-lock.json (npm ci) …"
  npm_ci --loglevel=error >&2 || fail "npm ci failed; its messages are above."
  # Packages whose lock file is older than ours by a clock's grain must not make every start install again.
  touch node_modules/.package-lock.json
fi
node=node_modules/node-linux-$arch/bin/node
[ -x "$node" ] || fail "the pinned Node is missing ($node): npm left optional packages out; run 'npm ci --include=optional'."

# Says what it does, and what is missing; returns at once when the addon is up to date.
sh native/build.sh >&2

# What short commands are run from.
$node release/bundle-commands.ts >&2
