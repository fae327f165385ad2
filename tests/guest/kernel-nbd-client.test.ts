/**
 * The NBD client of the Linux kernel, over TCP: nbd-client in a guest attaches a volume, in the clear and with TLS. A mounted file
 * system carries on when the daemon is killed under it and started again.
 */
import { createHash } from 'node:crypto'
import { mkdir, mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { gzipSync } from 'node:zlib'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { TestAuthority } from '@atoll/nbd-client/testing'
import { hasPrograms } from '../cli/test-programs.ts'
import { mountExport } from '../clients/mounted-export.ts'
import { clientOutcome, runClient } from '../clients/run-client.ts'
import { freePort } from '../free-port.ts'
import { TestHome } from '../test-home.ts'
import type { Ready } from '../test-home.ts'
import { canRunGuests, guestDisk, makeGuestLimitMs } from './guest-disk.ts'
import type { GuestDisk } from './guest-disk.ts'
import { diskTrouble, failOnDiskTrouble } from './guest-scripts.ts'
import { QemuGuest, userNetwork } from './qemu-guest.ts'

const volumeBytes = 128 * 1024 * 1024

describe.skipIf(!canRunGuests() || !hasPrograms('e2fsck', 'debugfs', 'nbdfuse', 'openssl', 'cc'))(
  "the kernel's NBD client",
  () => {
    let disk: GuestDisk
    let folder: string
    beforeAll(async () => {
      disk = await guestDisk()
      folder = await mkdtemp(join(tmpdir(), 'atoll-guest-'))
    }, makeGuestLimitMs)
    afterAll(async () => {
      if (folder !== undefined) await rm(folder, { recursive: true, force: true })
    })

    test('carries a file system over TCP in the clear', async () => {
      await using home = await TestHome.create()
      const ready = await home.start('--nbd', '127.0.0.1:0', '--nbd-insecure')
      await carriesAFileSystem({ home, ready, options: '', before: '' })
    })

    test('carries a file system over TLS and through kill -9 of the daemon, and comes in neither in the clear nor without a certificate', async () => {
      await using home = await TestHome.create()
      const [server, stranger] = [join(home.path, 'tls'), join(home.path, 'stranger')]
      const authority = await TestAuthority.create(server)
      await authority.issue(server, { commonName: 'localhost', usage: 'server' })
      await authority.issue(server, { commonName: 'a-guest', usage: 'client' })
      await (await TestAuthority.create(stranger)).issue(stranger, { commonName: 'a-stranger', usage: 'client' })
      const listen = ['--nbd', `127.0.0.1:${await freePort()}`, '--nbd-tls', server]
      const ready = await home.start(...listen)

      const files = [
        ['ca.pem', join(server, 'ca-cert.pem')],
        ['cert.pem', join(server, 'client-cert.pem')],
        ['key.pem', join(server, 'client-key.pem')],
        ['stranger-cert.pem', join(stranger, 'client-cert.pem')],
        ['stranger-key.pem', join(stranger, 'client-key.pem')],
      ] as const
      const written = await Promise.all(
        files.map(async ([name, path]) => `cat >/run/${name} <<END\n${await readFile(path, 'utf8')}END\n`),
      )
      const anchor = '-cacertfile /run/ca.pem -tlshostname localhost'
      await carriesAFileSystem({
        home,
        ready,
        again: async () => {
          await home.end('SIGKILL')
          await home.start(...listen)
        },
        options: `${anchor} -certfile /run/cert.pem -keyfile /run/key.pem`,
        before: `${written.join('')}
comes_in() { nbd-client $server /dev/nbd1 -N $export "$@" && size=$(blockdev --getsize64 /dev/nbd1) && [ "$size" -gt 0 ]; }
for way in '' '${anchor}' '${anchor} -certfile /run/stranger-cert.pem -keyfile /run/stranger-key.pem'; do
  if comes_in $way; then
    say a stranger came in with $way
    exit 7
  fi
done
`,
      })
    })

    interface Carried {
      readonly home: TestHome
      readonly ready: Ready
      /** How nbd-client connects. */
      readonly options: string
      /** What the guest does first, with $server and $export at hand. */
      readonly before: string
      /** Kills the daemon and starts it again, at the same address. */
      readonly again?: () => Promise<void>
    }

    async function carriesAFileSystem({ home, ready, options, before, again }: Carried): Promise<void> {
      const startedAt = performance.now()
      home.cli('volume', 'create', 'disk', '--size', String(volumeBytes))
      const { exportName } = home.json<{ exportName: string }>('volume', 'attach', 'disk')
      // QEMU's user network shows this machine's 127.0.0.1 as 10.0.2.2.
      const { port } = new URL(ready.nbd ?? '')
      const script = `
server='10.0.2.2 ${port}'
export='${exportName}'
modprobe nbd nbds_max=2 max_part=0 || exit 2
${before}
connect() { nbd-client $server /dev/nbd0 -N $export -b 4096 -C 2 ${options} "$@"; }
attach() {
  connect || exit 3
  [ "$(blockdev --getsize64 /dev/nbd0)" = ${volumeBytes} ] || exit 4
}
detach() {
  nbd-client -d /dev/nbd0 || exit 3
  while nbd-client -c /dev/nbd0; do usleep 50000; done
}
attach
say attached with $(cat /sys/block/nbd0/queue/write_cache)
mkfs.ext4 -q -F -E lazy_itable_init=0 /dev/nbd0 && mount /dev/nbd0 /mnt || exit 5
fio --name=load --filename=/mnt/fio --size=16M --rw=randwrite --bsrange=4k-64k --direct=1 --ioengine=libaio --iodepth=32 \\
  --verify=crc32c --do_verify=1 --verify_fatal=1 --fsync=64 --eta=never --output=/run/fio.out || { cat /run/fio.out; exit 6; }
dd if=/dev/urandom of=/mnt/kept bs=64k count=50 conv=fsync 2>/dev/null || exit 5
sha256sum </mnt/kept | cut -c 1-64 >/mnt/kept.sum && sync || exit 5
say kept $(cat /mnt/kept.sum)
wait_for_host trim
rm /mnt/fio && sync && fstrim /mnt || exit 5
umount /mnt && e2fsck -f -n /dev/nbd0 || exit 8
detach
attach
mount -o ro /dev/nbd0 /mnt || exit 5
[ "$(sha256sum </mnt/kept | cut -c 1-64)" = "$(cat /mnt/kept.sum)" ] || exit 8
umount /mnt
detach
${again === undefined ? '' : await carriesOn()}
say detached after $(cut -d ' ' -f 1 /proc/uptime) s
${failOnDiskTrouble}
`
      await using guest = await QemuGuest.start({
        name: 'nbd-client',
        folder,
        script,
        devices: [
          '-drive',
          `if=none,id=root,file=${disk.qcow2},format=qcow2,snapshot=on`,
          '-device',
          'virtio-blk-pci,drive=root,bootindex=0',
          ...userNetwork,
        ],
      })
      expect(await guest.hear('attached')).toBe('with write back')
      const kept = await guest.hear('kept')
      const usedBytes = (): number => home.json<{ usedBytes: number }>('volume', 'show', 'disk').usedBytes
      // mkfs has written 24 MiB, fio 16, and the file that stays has 3; fstrim gives fio's back. Counts may be a second old.
      await expect.poll(usedBytes).toBeGreaterThan(40 * 1024 * 1024)
      guest.tell('trim')
      if (again !== undefined) {
        await guest.hear('wrote', 5)
        const writtenAtKill = guest.said('wrote').length
        await again()
        guest.tell('again')
        // One file may have been under way, the others were written over the new connections.
        await guest.hear('wrote', writtenAtKill + 10)
        console.log(`killed after ${writtenAtKill} files, ${guest.said('wrote').length} now`)
        guest.tell('stop')
      }
      await guest.hear('detached')
      await guest.succeeds()
      expect(guest.console).not.toMatch(diskTrouble)
      // However many files came while the daemon was killed: each has at most seven blocks.
      const logBytes = guest.said('wrote').length * 7 * 4096
      await expect.poll(usedBytes).toBeLessThan(29 * 1024 * 1024 + logBytes)

      home.cli('volume', 'detach', 'disk')
      const uri = home.cli('volume', 'attach', 'disk', '--read-only', '--format', 'uri')
      const mountpoint = join(home.path, 'mounted')
      await mkdir(mountpoint)
      await using mounted = await mountExport(uri, mountpoint, '--readonly')
      const checked = await clientOutcome('e2fsck', '-f', '-n', mounted.path)
      expect(checked, checked.output).toMatchObject({ exitCode: 0 })
      const dumped = join(home.path, 'dumped')
      await runClient('debugfs', '-R', `dump kept ${dumped}`, mounted.path)
      expect(
        createHash('sha256')
          .update(await readFile(dumped))
          .digest('hex'),
      ).toBe(kept)
      console.log(`${((performance.now() - startedAt) / 1000).toFixed(1)} s`)
    }

    /** Files are written and synced, one after the other, until the host says `stop`; at its word `again` nbd-client connects again. */
    async function carriesOn(): Promise<string> {
      const library = join(folder, 'nbd-client-lasting.so')
      await runClient('cc', '-Os', '-s', '-shared', '-fPIC', '-o', library, join(import.meta.dirname, 'nbd-client-lasting.c'))
      const encoded = gzipSync(await readFile(library)).toString('base64')
      // A request that a dead connection holds is asked again after -t, in seconds.
      return `
echo ${encoded} | base64 -d | gunzip >/run/lasting.so || exit 2
lasting() { NBD_DEAD_SECONDS=300 LD_PRELOAD=/run/lasting.so connect -t 30; }
lasting && mount /dev/nbd0 /mnt && mkdir /mnt/log || exit 3
write_files() {
  n=0
  while [ ! -e /run/stop ]; do
    n=$((n + 1))
    dd if=/dev/urandom of=/mnt/log/$n bs=4k count=$((n % 7 + 1)) conv=fsync 2>/dev/null || {
      say trouble with file $n
      return 1
    }
    echo "$(sha256sum </mnt/log/$n | cut -c 1-64)  $n" >>/run/log.sums
    say wrote $n
    usleep 20000
  done
}
write_files & writer=$!
wait_for_host again
export NBD_AGAIN=yes
lasting || exit 3
unset NBD_AGAIN
wait_for_host stop
touch /run/stop
wait $writer || exit 6
umount /mnt && e2fsck -f -n /dev/nbd0 || exit 8
mount -o ro /dev/nbd0 /mnt && cd /mnt/log && sha256sum -c -s /run/log.sums || exit 8
cd / && umount /mnt || exit 5
detach
`
    }
  },
)
