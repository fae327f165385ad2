#!/bin/bash
# A real one-node Ceph cluster for tests, all of it in a folder: a monitor, an OSD on a sparse file and, if wanted, a manager.
#
#   cluster.sh start DIR    makes it, or starts again what of it does not run; data is kept. Prints the path of its ceph.conf.
#   cluster.sh stop DIR     ends its daemons (STOP_SIGNAL, default TERM) by their pids; the folder stays.
#   cluster.sh remove DIR   ends it for good: daemons, network namespace and folder.
#   cluster.sh cut DIR      takes the network away between it and everybody else (NETNS=1); `mend DIR` brings it back.
#
# Environment of the first start: OSDS=1  POOLS="atoll" (names)  SIZE=1 (copies)  MGR=0|1 (1: usage figures; a few seconds more)
# BLOCK_BYTES=10737418240 (of an OSD)  NETNS=0|1 (1: in a network namespace of its own, made with iproute2)
# OWNER_PID: when this process is gone, the cluster ends and its folder is removed, whatever became of the test.
# Nothing outside of DIR is touched but that namespace; ports are free ones on 127.0.0.1; the exit code is 3 if a Debian package is missing.
set -euo pipefail
[ $# -eq 2 ] || { sed -n '4,7p' "$0" >&2; exit 2; }
command=$1
mkdir -p "$2"
dir=$(cd "$2" && pwd -P)
conf=$dir/ceph.conf
export CEPH_CONF=$conf
unset CEPH_ARGS
mkdir -p "$dir/run" "$dir/log"

# Whether the daemon with this name (mon.a, osd.0, mgr.x) runs, and is ours.
is_alive() {
  local pid
  pid=$(cat "$dir/run/$1.pid" 2>/dev/null) && [ -n "$pid" ] && tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -qF -- "-c $conf"
}
stop_all() {
  local signal=$1 kind file name
  for kind in mgr osd mon; do
    for file in "$dir/run/$kind".*.pid; do
      [ -e "$file" ] || continue
      name=$(basename "$file" .pid)
      if is_alive "$name"; then kill "-$signal" "$(cat "$file")" || true; fi
      for _ in $(seq 100); do is_alive "$name" || break; sleep 0.1; done
      if is_alive "$name"; then kill -KILL "$(cat "$file")" || true; fi
      rm -f "$file"
    done
  done
}
PATH=$PATH:/usr/sbin:/sbin
# Its own, if it has one: atoll-ceph-NUMBER.
netns=$(cat "$dir/netns" 2>/dev/null || true)
remove_all() {
  stop_all KILL
  if [ -n "$netns" ]; then ip netns del "$netns" 2>/dev/null || true; fi
  rm -rf "$dir"
}
case $command in
  start) ;;
  stop) stop_all "${STOP_SIGNAL:-TERM}" && exit 0 ;;
  remove) remove_all && exit 0 ;;
  # The side in the namespace: here packets are lost without a word, as they are behind a switch.
  cut) exec ip -n "$netns" link set inner down ;;
  mend) exec ip -n "$netns" link set inner up ;;
  *) echo "cluster.sh: start, stop, remove, cut or mend, not $command" >&2 && exit 2 ;;
esac

for program in ceph-mon ceph-osd ceph-authtool monmaptool ceph rados; do
  command -v "$program" >/dev/null || { echo "cluster.sh: $program is missing: apt-get install ceph-mon ceph-osd" >&2; exit 3; }
done
osds=${OSDS:-1} pools=${POOLS-atoll} copies=${SIZE:-1} with_mgr=${MGR:-0} block_bytes=${BLOCK_BYTES:-10737418240}
address=$(cat "$dir/address" 2>/dev/null || echo 127.0.0.1)
in_netns=()
if [ -n "$netns" ]; then in_netns=(ip netns exec "$netns"); fi
# Only for what hangs.
deadline=$((SECONDS + 500))
fail() {
  echo "cluster.sh: $*" >&2
  tail -n 5 "$dir"/log/*.out >&2 || true
  exit 1
}
# Detached, with nothing of ours open; the pid is written down.
spawn() {
  local name=$1
  shift
  if is_alive "$name"; then return 0; fi
  setsid "${in_netns[@]}" "$@" -c "$conf" >>"$dir/log/$name.out" 2>&1 </dev/null &
  local pid=$!
  echo $pid >"$dir/run/$name.pid"
  disown
  # Until it is the program, and no longer this script, it would not be known as alive.
  until is_alive "$name" || ! kill -0 $pid 2>/dev/null; do sleep 0.01; done
}
tool() { env -u CEPH_CONF ceph-authtool "$@" >/dev/null; }

write_conf() {
  local socket=$dir/run/\$name.asok
  # The path of a socket has 107 bytes.
  [ ${#dir} -le 80 ] || socket=
  cat >"$conf" <<CONF
[global]
fsid = $fsid
mon host = v2:$address:$port
public addr = $address
cluster addr = $address
ms bind ipv6 = false
ms bind msgr1 = false
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = $dir/\$name.keyring
run dir = $dir/run
log file = $dir/log/\$name.log
log to stderr = false
err to stderr = true
mon cluster log file = $dir/log/cluster.log
admin socket = $socket
osd pool default size = $copies
osd pool default min size = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon allow pool delete = true
mon max pg per osd = 1000
[client]
admin socket =
log file =
# A client looks for a newer map soon: an OSD that is back is used again in a second.
objecter tick interval = 0.5
objecter timeout = 1
[mon]
mon data = $dir/mon.\$id
keyring = $dir/mon.\$id/keyring
mon data avail warn = 2
mon data avail crit = 1
mon osd min down reporters = 1
mon osd report timeout = 300
mon osd adjust heartbeat grace = false
mon osd adjust down out interval = false
mon osd down out interval = 0
paxos propose interval = 0.05
paxos min wait = 0.01
auth allow insecure global id reclaim = false
[mgr]
mgr data = $dir/mgr.\$id
keyring = $dir/mgr.\$id/keyring
mgr initial modules =
mgr stats period = 1
[osd]
osd data = $dir/osd.\$id
keyring = $dir/osd.\$id/keyring
osd objectstore = bluestore
bluestore block size = $block_bytes
bluestore block create = true
bluestore fsck on mkfs = false
bluestore cache autotune = false
bluestore cache size = 134217728
# Closing the device takes up to this long.
bdev aio poll ms = 20
osd crush update on start = true
osd heartbeat interval = 1
osd heartbeat grace = 4
# An OSD alone that was not run for so many heartbeats of grace lets requests wait for ever: nobody renews its right to answer reads.
osd pool default read lease ratio = 100
osd beacon report interval = 5
osd max markdown count = 1000000
osd scrub load threshold = 0
osd mon heartbeat interval = 5
CONF
}

# A port outside of what the kernel gives to clients; whether it is free shows when the monitor takes it.
make_monitor() {
  port=$((20000 + RANDOM % 12000))
  rm -rf "$dir"/mon.* "$dir/monmap"
  write_conf
  mkdir "$dir/mon.a"
  env -u CEPH_CONF monmaptool --create --clobber --fsid "$fsid" --addv a "[v2:$address:$port]" "$dir/monmap" >"$dir/log/mkfs.out"
  ceph-mon --mkfs -i a --monmap "$dir/monmap" --keyring "$dir/seed.keyring" >>"$dir/log/mkfs.out" 2>&1 || fail "the monitor cannot be made"
}

# A name that is free becomes ours with its making; the addresses go with its number. They are of a net that nobody routes (RFC 2544), and
# the cluster's own one is on the loopback device in there, so that it reaches itself while the network is cut.
make_netns() {
  local number
  for number in $(seq 0 255); do
    if ip netns add "atoll-ceph-$number" 2>"$dir/log/netns.out"; then netns=atoll-ceph-$number && break; fi
  done
  [ -n "$netns" ] || fail "no network namespace can be made: $(cat "$dir/log/netns.out")"
  echo "$netns" >"$dir/netns"
  address=198.18.$number.2
  echo "$address" >"$dir/address"
  ip link add "atollceph$number" type veth peer name inner netns "$netns"
  ip addr add "198.18.$number.5/30" dev "atollceph$number"
  ip link set "atollceph$number" up
  ip -n "$netns" addr add "198.18.$number.6/30" dev inner
  ip -n "$netns" addr add "$address/32" dev lo
  ip -n "$netns" link set lo up
  ip -n "$netns" link set inner up
  ip route add "$address/32" via "198.18.$number.6"
  in_netns=(ip netns exec "$netns")
}

if [ ! -e "$dir/made" ]; then
  if [ "${NETNS:-0}" = 1 ] && [ -z "$netns" ]; then make_netns; fi
  stop_all KILL
  rm -rf "$dir"/mon.* "$dir"/osd.* "$dir"/mgr.* "$dir"/*.keyring
  fsid=$(cat /proc/sys/kernel/random/uuid)
  seed=$dir/seed.keyring
  tool -C "$seed" -n mon. --gen-key --cap mon 'allow *'
  tool -C "$dir/client.admin.keyring" -n client.admin --gen-key --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *'
  tool "$seed" --import-keyring "$dir/client.admin.keyring"
  # The keys go in with the monitor's seed: no round trip for each.
  for ((i = 0; i < osds; i++)); do
    mkdir "$dir/osd.$i"
    cat /proc/sys/kernel/random/uuid >"$dir/osd.$i/uuid"
    tool -C "$dir/osd.$i/keyring" -n "osd.$i" --gen-key --cap mon 'allow profile osd' --cap osd 'allow *' --cap mgr 'allow profile osd'
    tool "$seed" --import-keyring "$dir/osd.$i/keyring"
  done
  if [ "$with_mgr" = 1 ]; then
    mkdir "$dir/mgr.x"
    tool -C "$dir/mgr.x/keyring" -n mgr.x --gen-key --cap mon 'allow profile mgr' --cap osd 'allow *'
    tool "$seed" --import-keyring "$dir/mgr.x/keyring"
  fi
  for attempt in 1 2 3 4 5 6; do
    make_monitor
    spawn mon.a ceph-mon -f -i a
    while is_alive mon.a && ! ceph --connect-timeout 2 -s >/dev/null 2>"$dir/log/probe.out"; do
      [ $SECONDS -lt $deadline ] || fail "the monitor does not answer"
    done
    if is_alive mon.a; then break; fi
    # Somebody has the port.
    [ "$attempt" -lt 6 ] || fail "the monitor ended"
  done
  pids=()
  for ((i = 0; i < osds; i++)); do
    ceph-osd --mkfs -i "$i" --osd-uuid "$(cat "$dir/osd.$i/uuid")" --monmap "$dir/monmap" --no-mon-config >>"$dir/log/mkfs.$i.out" 2>&1 &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || fail "an OSD cannot be made"; done
  echo "$osds" >"$dir/made"
fi
osds=$(cat "$dir/made")
spawn mon.a ceph-mon -f -i a
for ((i = 0; i < osds; i++)); do spawn "osd.$i" ceph-osd -f -i "$i"; done
if [ -d "$dir/mgr.x" ]; then
  command -v ceph-mgr >/dev/null || { echo "cluster.sh: ceph-mgr is missing: apt-get install ceph-mgr" >&2; exit 3; }
  spawn mgr.x ceph-mgr -f -i x
fi

if [ ! -e "$dir/pools" ]; then
  for pool in $pools; do printf 'osd pool create %s 8\nosd pool application enable %s atoll\n' "$pool" "$pool"; done >"$dir/pools.commands"
  until ceph --connect-timeout 5 <"$dir/pools.commands" >"$dir/log/pools.out" 2>&1; do
    is_alive mon.a || fail "the monitor ended"
    [ $SECONDS -lt $deadline ] || fail "the pools cannot be made"
  done
  echo "$pools" >"$dir/pools"
fi
for pool in $(cat "$dir/pools"); do
  until timeout 300 rados -p "$pool" put probe /dev/null 2>"$dir/log/probe.out" && timeout 300 rados -p "$pool" rm probe; do
    is_alive mon.a || fail "the monitor ended"
    [ $SECONDS -lt $deadline ] || fail "pool $pool takes no write"
    sleep 0.2
  done
done
if [ -d "$dir/mgr.x" ]; then
  until ceph --connect-timeout 5 df -f json 2>/dev/null | grep -q '"max_avail":[1-9]'; do
    is_alive mgr.x || fail "the manager ended"
    [ $SECONDS -lt $deadline ] || fail "the manager gives no figures"
    sleep 0.2
  done
fi
if [ -n "${OWNER_PID:-}" ] && [ ! -e "$dir/run/guard" ]; then
  touch "$dir/run/guard"
  (
    while kill -0 "$OWNER_PID" 2>/dev/null && [ -e "$dir/run/guard" ]; do sleep 1; done
    if [ -e "$dir/run/guard" ]; then remove_all; fi
  ) >/dev/null 2>&1 </dev/null &
  disown
fi
echo "$conf"
