#!/bin/busybox sh
# The initrd's init: loads the drivers of the disk, mounts the file system labelled atoll-root and goes there.
export PATH=/bin
busybox mkdir -p /proc /sys /dev
busybox mount -t proc proc /proc
busybox --install -s /bin
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
while read -r module; do insmod "/modules/$module" || echo "initrd: $module does not load"; done </modules/order
tries=0
# The partition appears a moment after its disk's driver.
until device=$(findfs LABEL=atoll-root 2>/dev/null); do
  tries=$((tries + 1))
  if [ "$tries" -gt 500 ]; then
    echo "initrd: no file system labelled atoll-root"
    poweroff -f
  fi
  usleep 20000
done
mount -t ext4 "$device" /root || {
  echo "initrd: $device cannot be mounted"
  poweroff -f
}
for folder in proc sys dev; do mount --move "/$folder" "/root/$folder"; done
exec switch_root /root /sbin/guest-init
