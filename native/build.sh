#!/bin/sh
# Builds the native addon into native/atoll.linux-<arch>.node: at once when nothing changed since the last build.
# Usage: build.sh [--profile NAME]   (default: release; any profile of Cargo.toml, "dev" for quick builds)
set -eu

# A function, so that the shell has read all of it before a long build: the file may change meanwhile.
build() {
  cd "$(dirname -- "$0")"
  profile=release
  case ${1-} in
    '') ;;
    --profile) profile=${2:?"build.sh: --profile needs a name"} ;;
    *)
      echo "build.sh: unknown option $1 (usage: build.sh [--profile NAME])" >&2
      exit 2
      ;;
  esac
  case $(uname -m) in
    x86_64) arch=x64 ;;
    aarch64 | arm64) arch=arm64 ;;
    *)
      echo "build.sh: the addon is built for x86_64 and aarch64; this machine is a $(uname -m)" >&2
      exit 1
      ;;
  esac

  addon=atoll.linux-$arch.node
  # Says what the addon was built as: a build of another profile is never taken for this one.
  stamp=target/$addon.profile
  if [ -e "$addon" ] && [ "$(cat "$stamp" 2>/dev/null || true)" = "$profile" ] &&
    [ -z "$(find . -name target -prune -o \( -name '*.rs' -o -name 'Cargo.*' -o -name build.sh \) -newer "$stamp" -print | head -n 1)" ]; then
    exit 0
  fi

  if ! command -v cargo >/dev/null 2>&1; then
    echo "atoll: the native addon has to be built and cargo is not on the PATH: install a Rust toolchain (https://rustup.rs), then run this again" >&2
    exit 1
  fi
  echo "atoll: building the native addon (the first time takes a minute or two) …" >&2
  folder=$profile
  [ "$profile" = dev ] && folder=debug
  mkdir -p target
  # Dated before the build: a source that changes meanwhile is newer, so the next run builds again.
  started=$(mktemp target/addon.XXXXXX)
  trap 'rm -f "$started" "$addon.new"' EXIT
  cargo build --locked --profile "$profile" --package atoll-binding
  cp "${CARGO_TARGET_DIR:-target}/$folder/libatoll_binding.so" "$addon.new"
  # In one step: a process that has the old file loaded keeps it, one that starts finds the old or the new one whole.
  mv -f "$addon.new" "$addon"
  echo "$profile" >"$stamp"
  touch -r "$started" "$stamp"
}

build "$@"
