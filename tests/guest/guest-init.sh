#!/bin/busybox sh
# The first process of a test guest: modules and network, then the script that the host passed in fw_cfg as
# opt/atoll/script. Its exit code is printed as "RESULT rc=N" on the serial console, and the guest powers off.
#
# For the script:
#   say WORDS...         a line "SAY WORDS..." on the console, which is what the host looks for
#   wait_for_host WORD   goes on when the host has written that word to the console
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb
mount -t tmpfs tmpfs /run
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
for module in virtio_net virtio_rng qemu_fw_cfg; do modprobe -q "$module"; done
hostname atoll-guest
ip link set lo up
if [ -e /sys/class/net/eth0 ]; then
  # QEMU's user network: the host's 127.0.0.1 is 10.0.2.2.
  ip addr add 10.0.2.15/24 dev eth0
  ip link set eth0 up
fi
# What the host writes must not come back as output.
stty -echo </dev/console

cat >/run/words.sh <<'END'
say() { printf '\nSAY %s\n' "$*"; }
wait_for_host() {
  while read -r word </dev/console; do
    [ "$word" = "$1" ] && return 0
  done
}
END
script=/sys/firmware/qemu_fw_cfg/by_name/opt/atoll/script/raw
code=127
if [ -e "$script" ]; then
  cat /run/words.sh "$script" >/run/script.sh
  sh /run/script.sh </dev/null
  code=$?
else
  echo 'the host passed no opt/atoll/script'
fi
sync
# So that only a clean file system is left behind: whatever still writes goes first.
kill -9 -1 2>/dev/null
mount -o remount,ro / && echo 'SAY root is read-only'
dmesg -n 1
printf '\nRESULT rc=%s\n' "$code"
poweroff -f
