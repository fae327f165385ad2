#!/bin/sh
# Makes a raw disk image with a small Debian root file system (ext4, 64 MiB, sparse) from a few Debian packages: no root
# rights, no loop device, no debootstrap. A kernel started with root= on it finds BusyBox's init and a shell.
#
#   scripts/make-image.sh OUT.img
set -eu

if [ $# -ne 1 ]; then
  echo "usage: make-image.sh OUT.img" >&2
  exit 2
fi
out=$(realpath -m -- "$1")
PATH=$PATH:/usr/sbin:/sbin
for tool in apt-get:apt dpkg-deb:dpkg mke2fs:e2fsprogs; do
  command -v "${tool%%:*}" >/dev/null 2>&1 || {
    echo "make-image: ${tool%%:*} is missing: apt-get install ${tool##*:}" >&2
    exit 1
  }
done

work=$(mktemp -d)
trap 'rm -rf -- "$work"' EXIT INT TERM
mkdir "$work/packages" "$work/tree"

# The sandbox user of apt cannot write into a folder of mode 0700, and as an ordinary user there is none to switch to.
download() { (cd "$work/packages" && apt-get -qq -o APT::Sandbox::User=root -o Acquire::Retries=3 download busybox-static base-files netbase); }
if ! download 2>"$work/errors"; then
  if [ "$(id -u)" -ne 0 ]; then
    cat "$work/errors" >&2
    echo "make-image: the packages could not be downloaded; run 'apt-get update' as root, then try again" >&2
    exit 1
  fi
  apt-get -qq -o Acquire::Retries=3 update
  download
fi
for package in "$work"/packages/*.deb; do
  dpkg-deb -x "$package" "$work/tree"
done

cd "$work/tree"
mkdir -p bin sbin dev proc sys tmp run root etc var/log
# Debian ships the program as /bin/busybox; its applets are links to it.
for applet in sh ls cat cp mv rm mkdir mount umount ps dmesg grep sed vi df sync dd ip ping hostname login; do
  [ -e "bin/$applet" ] || ln -s busybox "bin/$applet"
done
for applet in init poweroff reboot halt getty; do
  [ -e "sbin/$applet" ] || ln -s ../bin/busybox "sbin/$applet"
done
echo 'root::0:0:root:/root:/bin/sh' >etc/passwd
echo 'root:x:0:' >etc/group
echo atoll-guest >etc/hostname
cat >etc/fstab <<'END'
proc /proc proc defaults 0 0
sysfs /sys sysfs defaults 0 0
END
cat >etc/inittab <<'END'
::sysinit:/bin/mount -a
::askfirst:/bin/sh
::ctrlaltdel:/sbin/reboot
END

rm -f -- "$out"
truncate -s 64M "$out"
mke2fs -q -t ext4 -L atoll-root -E root_owner=0:0 -d "$work/tree" "$out"
