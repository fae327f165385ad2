#!/bin/bash
# Makes a bootable Debian disk for the guest tests out of Debian packages: no root rights, no loop device, no debootstrap, and
# nothing of this machine's apt is changed. Prints the folder that holds
#
#   disk.qcow2   MBR, a FAT partition with the boot loader, kernel and initrd, and an ext4 partition that is the root file system
#   vmlinuz, initrd   the same kernel and initrd, for QEMU's -kernel
#   versions     the packages that are in it
#
# The folder lies in the cache (ATOLL_GUEST_CACHE, else $XDG_CACHE_HOME/atoll-guest, else ~/.cache/atoll-guest) and is named by the packages' versions and
# these scripts, so that only a change makes another one. Several runs at once wait for one another.
set -euo pipefail

here=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
cache=${ATOLL_GUEST_CACHE:-${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/atoll-guest}
suite=${ATOLL_GUEST_SUITE:-bookworm}
PATH=$PATH:/usr/sbin:/sbin
for tool in apt-get:apt dpkg-deb:dpkg mke2fs:e2fsprogs sfdisk:fdisk mformat:mtools syslinux:syslinux qemu-img:qemu-utils flock:util-linux; do
  command -v "${tool%%:*}" >/dev/null || {
    echo "make-guest: ${tool%%:*} is missing: apt-get install ${tool##*:}" >&2
    exit 1
  }
done
boot_record=/usr/lib/syslinux/mbr/mbr.bin
[ -e "$boot_record" ] || {
  echo "make-guest: $boot_record is missing: apt-get install syslinux-common" >&2
  exit 1
}

mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9

# What apt said within the last day still holds, for the same scripts.
scripts=$(cat "$here/make-guest.sh" "$here/guest-init.sh" "$here/initrd-init.sh" | sha256sum | cut -c 1-16)
newest=$cache/newest-$suite-$scripts
if [ -n "$(find "$newest" -mtime -1 2>/dev/null)" ] && out=$(cat "$newest") && [ -e "$out/versions" ]; then
  touch "$out"
  echo "$out"
  exit
fi

# --- An apt of our own. Against an empty dpkg status, "install" names the whole closure of dependencies.
apt=$cache/apt-$suite
archives=$apt/cache/archives
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
mkdir -p "$apt/state/lists/partial" "$archives/partial" "$apt/etc/apt.conf.d" "$apt/etc/preferences.d"
: >"$apt/status"
# The mirrors that this machine uses itself, whatever they are.
mirror_of() {
  cat /etc/apt/sources.list.d/*.sources 2>/dev/null | awk -v security="$1" '
    /^URIs:/ { uri = $2 }
    /^Suites:/ && uri ~ /debian/ && ($0 ~ /-security/) == security { print uri; exit }'
}
mirror=$(mirror_of 0)
security=$(mirror_of 1)
mirror=${mirror:-http://deb.debian.org/debian}
security=${security:-http://deb.debian.org/debian-security}
cat >"$apt/etc/sources.list" <<END
deb [signed-by=$keyring] $mirror $suite main
deb [signed-by=$keyring] $mirror $suite-updates main
deb [signed-by=$keyring] $security $suite-security main
END
apt_options=(-o "Dir::Etc=$apt/etc" -o Dir::Etc::sourceparts=/dev/null -o "Dir::State=$apt/state" -o "Dir::State::status=$apt/status"
  -o "Dir::Cache=$apt/cache" -o APT::Sandbox::User=root -o APT::Install-Recommends=false -o Acquire::Retries=3
  -o Acquire::Languages=none -o Debug::NoLocking=true)
# Package lists of the last day are new enough; a mirror that cannot be reached is no reason to stop when there are older ones.
if [ -z "$(find "$apt/updated" -mtime -1 2>/dev/null)" ]; then
  if apt-get -qq "${apt_options[@]}" update >&2; then
    touch "$apt/updated"
  else
    [ -e "$apt/updated" ] || exit 1
  fi
fi

kernel=$(apt-cache "${apt_options[@]}" depends linux-image-cloud-amd64 | awk '/Depends: linux-image-[0-9]/ { print $2; exit }')
packages=(busybox-static kmod e2fsprogs nbd-client fio)
# "Inst NAME (VERSION SOURCE [ARCH])" for each package that would be installed; colons of versions are escaped in file names.
files=$(apt-get -qq -s "${apt_options[@]}" install "${packages[@]}" |
  sed -nE 's/^Inst ([^ ]+) \(([^ ]+) .*\[([a-z0-9]+)\]\).*/\1_\2_\3.deb/p' | sed 's/:/%3a/g')
kernel_version=$(apt-cache "${apt_options[@]}" show --no-all-versions "$kernel" | awk '/^Version:/ { print $2; exit }')
kernel_file=${kernel}_${kernel_version}_amd64.deb
versions=$(printf '%s\n' "$files" "$kernel_file" | sort)
key=$(echo "$scripts $versions" | sha256sum | cut -c 1-16)
out=$cache/$suite-$key
if [ -e "$out/versions" ]; then
  touch "$out"
  echo "$out" >"$newest"
  echo "$out"
  exit
fi

# --- Packages: downloaded where missing, unpacked without their scripts.
work=$(mktemp -d "$cache/work-XXXXXX")
trap 'rm -rf -- "$work"' EXIT
trap 'exit 1' INT TERM
apt-get -qq -y --download-only "${apt_options[@]}" install "${packages[@]}" >/dev/null
# The kernel alone: what it depends on makes initrds and is not needed.
[ -e "$archives/$kernel_file" ] || (cd "$archives" && apt-get -qq "${apt_options[@]}" download "$kernel" >&2)

tree=$work/tree
mkdir -p "$tree"/usr/{bin,sbin,lib,lib64}
for folder in bin sbin lib lib64; do ln -s "usr/$folder" "$tree/$folder"; done
unpack() {
  dpkg-deb --fsys-tarfile "$1" | tar -x --keep-directory-symlink --no-same-owner -C "$tree" \
    --exclude='./usr/share/'{doc,man,locale,info,bash-completion,lintian,bug}'/*' --exclude='./lib/modules/*/kernel/'{sound,drivers/{gpu,media,infiniband,usb,hid,scsi}}
}
for file in $files; do
  # Interpreters and installers: what needs them does not run here.
  case $file in perl* | libperl* | python3* | libpython3* | debconf* | dpkg_* | adduser* | usrmerge*) continue ;; esac
  unpack "$archives/$file"
done
unpack "$archives/$kernel_file"
release=$(ls "$tree/lib/modules")
cp "$tree/boot/vmlinuz-$release" "$work/vmlinuz"
rm -rf "${tree:?}"/boot/*

# The guest's own programs, run by the guest's own loader: the machine needs no kmod, and no library of the same version.
library=$tree/usr/lib/x86_64-linux-gnu
kmod_as() { "$library/ld-linux-x86-64.so.2" --library-path "$library" --argv0 "$1" "$tree/usr/bin/kmod" "${@:2}"; }
kmod_as depmod -b "$tree" "$release"

# Modules: those we name with what they depend on; the rest is 100 MB that nobody loads.
module_paths() {
  for module in "$@"; do kmod_as modprobe -d "$tree" -S "$release" --show-depends "$module"; done |
    sed -n 's/^insmod \([^ ]*\).*/\1/p' | awk '!seen[$0]++'
}
boot_modules=$(module_paths virtio_pci virtio_blk ext4 crc32c_generic)
all_modules=$(module_paths virtio_pci virtio_blk ext4 crc32c_generic virtio_net qemu_fw_cfg virtio_rng nbd)
mkdir "$work/modules"
for path in $all_modules; do
  relative=${path#*"/lib/modules/$release/"}
  mkdir -p "$work/modules/$(dirname -- "$relative")"
  cp "$path" "$work/modules/$relative"
done
mkdir -p "$work/initrd"/{bin,modules,proc,sys,dev,root}
for path in $boot_modules; do
  cp "$path" "$work/initrd/modules/"
  basename -- "$path" >>"$work/initrd/modules/order"
done
cp "$tree"/lib/modules/"$release"/modules.{builtin,builtin.modinfo,order} "$work/modules/"
rm -rf "${tree:?}/lib/modules/$release"
mv "$work/modules" "$tree/lib/modules/$release"
kmod_as depmod -b "$tree" "$release"

# --- What makes a pile of packages a system.
mkdir -p "$tree"/{proc,sys,dev,run,tmp,root,mnt,etc,var,data}
chmod 1777 "$tree/tmp"
[ -e "$tree/bin/sh" ] || ln -s busybox "$tree/bin/sh"
for applet in $("$tree/bin/busybox" --list); do
  [ -e "$tree/bin/$applet" ] || [ -e "$tree/sbin/$applet" ] || ln -s busybox "$tree/bin/$applet"
done
echo 'root::0:0:root:/root:/bin/sh' >"$tree/etc/passwd"
echo 'root:x:0:' >"$tree/etc/group"
echo '127.0.0.1 localhost atoll-guest' >"$tree/etc/hosts"
ln -sf /proc/mounts "$tree/etc/mtab"
install -m 755 "$here/guest-init.sh" "$tree/sbin/guest-init"
ldconfig -r "$tree"

cp "$tree/bin/busybox" "$work/initrd/bin/"
install -m 755 "$here/initrd-init.sh" "$work/initrd/init"
(cd "$work/initrd" && find . | "$tree/bin/busybox" cpio -o -H newc 2>/dev/null) | gzip -1 >"$work/initrd.gz"

# --- The disk: MBR, FAT for the boot loader (1 to 32 MiB), ext4 for the root. No partition is ever mounted here.
disk=$work/disk.raw
truncate -s 320M "$disk"
sfdisk -q "$disk" <<'END'
label: dos
start=2048, size=63488, type=e, bootable
start=65536, type=83
END
fat=$disk@@1M
mformat -i "$fat" -T 63488 -h 16 -s 63 -H 2048 -v BOOT ::
cat >"$work/syslinux.cfg" <<'END'
SERIAL 0 115200
DEFAULT atoll
PROMPT 0
LABEL atoll
  KERNEL vmlinuz
  INITRD initrd.gz
  APPEND console=ttyS0 quiet panic=-1 mitigations=off nokaslr
END
mcopy -i "$fat" "$work/vmlinuz" "$work/initrd.gz" "$work/syslinux.cfg" ::
syslinux -t 1048576 -i "$disk"
dd if="$boot_record" of="$disk" conv=notrunc status=none
mke2fs -q -t ext4 -L atoll-root -E "offset=$((32 * 1024 * 1024)),root_owner=0:0" -d "$tree" "$disk" $((288 * 1024))k

mkdir "$work/out"
qemu-img convert -f raw -O qcow2 "$disk" "$work/out/disk.qcow2"
cp "$work/vmlinuz" "$work/out/vmlinuz"
cp "$work/initrd.gz" "$work/out/initrd"
echo "$versions" >"$work/out/versions"
rm -rf -- "$out"
mv "$work/out" "$out"
# What no run has asked for in two weeks is of packages that are gone.
find "$cache" -mindepth 1 -maxdepth 1 -type d -name "*-????????????????" -mtime +14 -exec rm -rf {} +
find "$cache" -maxdepth 1 -type f -name 'newest-*' -mtime +1 -delete
echo "$out" >"$newest"
echo "$out"
