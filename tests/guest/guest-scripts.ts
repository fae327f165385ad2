// What the guests of these tests run; `guest-init.sh` gives them `say` and `wait_for_host`.

/** In the kernel's log, what a disk that failed leaves behind. */
export const diskTrouble = /I\/O error|EXT4-fs (?:error|warning)|Buffer I\/O|blk_update_request|hung_task|blocked for more than/i

/** Ends a script with 9 when the kernel complained about a disk. */
export const failOnDiskTrouble = `
if dmesg | grep -E 'I/O error|EXT4-fs (error|warning)|Buffer I/O|blk_update_request|blocked for more than'; then
  say trouble with a disk, says the kernel
  exit 9
fi`

/**
 * Writes files that stay (/data/kept, their checksums said as `kept`), then, until the host says `stop`, two loads at once: numbered
 * files, each synced before it is said as `wrote NUMBER CHECKSUM`, and rounds of fio with verification, said as `verified ROUND`.
 * Then everything is read again, past the page cache, and said as `intact COUNT`. At the end a file comes (`grow`, `grown`) and goes
 * (`shrink`, `shrunk`).
 */
export const workload = `
say booted $(uname -r) from $(findfs LABEL=atoll-root)
mkdir -p /data/kept /data/log
for n in 1 2 3 4 5 6 7 8; do
  dd if=/dev/urandom of=/data/kept/$n bs=64k count=$n conv=fsync 2>/dev/null || exit 2
done
cd /data/kept && sha256sum * >/data/kept.sums && cd / && sync || exit 2
say kept $(sha256sum </data/kept.sums | cut -c 1-64)

write_files() {
  n=0
  while [ ! -e /run/stop ]; do
    n=$((n + 1))
    dd if=/dev/urandom of=/data/log/$n bs=4k count=$((n % 7 + 1)) conv=fsync 2>/dev/null || {
      say trouble with file $n
      return 1
    }
    sum=$(sha256sum </data/log/$n | cut -c 1-64)
    echo "$sum  $n" >>/run/log.sums
    say wrote $n $sum
    usleep 20000
  done
}
verify_rounds() {
  round=0
  while [ ! -e /run/stop ]; do
    round=$((round + 1))
    fio --name=load --filename=/data/fio --size=6M --rw=randwrite --bsrange=4k-64k --direct=1 --ioengine=libaio --iodepth=8 \\
      --verify=crc32c --do_verify=1 --verify_fatal=1 --randseed=$round --eta=never --output=/run/fio.out || {
      cat /run/fio.out
      say trouble with round $round of fio
      return 1
    }
    say verified $round
  done
}
write_files & writer=$!
verify_rounds & verifier=$!
wait_for_host stop
touch /run/stop
wait $writer || exit 3
wait $verifier || exit 4
sync
echo 3 >/proc/sys/vm/drop_caches
cd /data/log && sha256sum -c -s /run/log.sums || exit 5
cd /data/kept && sha256sum -c -s /data/kept.sums || exit 6
cd /
say intact $(wc -l </run/log.sums)
wait_for_host grow
dd if=/dev/urandom of=/data/big bs=1M count=16 conv=fsync 2>/dev/null || exit 7
say grown by 16 MiB
wait_for_host shrink
rm /data/big && sync && fstrim / || exit 7
say shrunk by 16 MiB
${failOnDiskTrouble}
`

/** Says what `workload` has left on the disk: `kept CHECKSUM` and `found NUMBER CHECKSUM` of every numbered file. Writes a little. */
export const inventory = `
say booted $(uname -r) from $(findfs LABEL=atoll-root)
cd /data/kept && sha256sum -c -s /data/kept.sums || exit 6
cd /data/log || exit 7
say kept $(sha256sum </data/kept.sums | cut -c 1-64)
for n in *; do
  echo "SAY found $n $(sha256sum <$n | cut -c 1-64)"
done
echo 'written after the rollback' >/data/after && sync || exit 8
say complete now
${failOnDiskTrouble}
`
