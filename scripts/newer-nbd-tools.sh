#!/bin/sh
# Debian 13's qemu-utils and libnbd-bin in a folder of their own, for tests of extended headers, which Debian 12's do not speak.
# Usage: newer-nbd-tools.sh FOLDER; afterwards FOLDER/run PROGRAM ARGS… runs one of them with its own libraries. Nothing of the
# machine changes: apt works on lists and a status of its own. A folder that is complete is left alone.
set -eu
out=$1
[ -x "$out/run" ] && exit 0
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
suite=trixie
mirror=$(sed -n 's/^URIs: *//p; s/^deb  *\(\[[^]]*\] *\)\{0,1\}\(http[^ ]*\).*/\2/p' /etc/apt/sources.list.d/*.sources /etc/apt/sources.list 2>/dev/null |
  grep -v security | head -n 1)
mirror=${mirror:-http://deb.debian.org/debian}
work=$out.work.$$
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/state" "$work/etc" "$work/root"
: >"$work/status"
echo "deb [signed-by=$keyring] $mirror $suite main" >"$work/etc/sources.list"
apt() {
  apt-get -qq -o Dir::Etc="$work/etc" -o Dir::Etc::sourceparts=/dev/null -o Dir::Etc::parts=/dev/null -o Dir::Etc::preferencesparts=/dev/null \
    -o Dir::State="$work/state" -o Dir::State::Lists="$work/lists" -o Dir::State::status="$work/status" -o Dir::Cache="$work/cache" \
    -o APT::Sandbox::User= -o APT::Install-Recommends=0 -o APT::Get::Assume-Yes=1 -o Acquire::Retries=3 "$@"
}
apt update
# Against an empty status this is the whole closure, down to the C library.
apt --download-only install qemu-utils libnbd-bin >/dev/null
for package in "$work"/cache/archives/*.deb; do dpkg-deb -x "$package" "$work/root"; done
cat >"$work/root/run" <<'RUN'
#!/bin/sh
here=$(cd "$(dirname "$0")" && pwd)
program=$1
shift
libraries=$(find "$here/usr/lib" "$here/lib" -maxdepth 1 -type d -name '*-linux-gnu' 2>/dev/null | tr '\n' ':')
loader=$(find "$here/usr/lib" "$here/lib" "$here/usr/lib64" "$here/lib64" -maxdepth 2 -name 'ld-linux-*.so.*' 2>/dev/null | head -n 1)
exec "$loader" --library-path "$libraries" "$here/usr/bin/$program" "$@"
RUN
chmod +x "$work/root/run"
# Two at once: one wins, the other's work is dropped.
mv "$work/root" "$out" 2>/dev/null || [ -x "$out/run" ]
