/** A virtual machine on a volume, from the import of its disk to the rollback: QEMU and a Linux kernel are the judges. */
import { createHash } from 'node:crypto'
import { mkdir, mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setImmediate as nextTurn } from 'node:timers/promises'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { clientOutcome, runClient } from '../clients/run-client.ts'
import { mountExport } from '../clients/mounted-export.ts'
import { hasPrograms } from '../cli/test-programs.ts'
import { TestHome } from '../test-home.ts'
import { canRunGuests, guestDisk, makeGuestLimitMs } from './guest-disk.ts'
import type { GuestDisk } from './guest-disk.ts'
import { diskTrouble, inventory, workload } from './guest-scripts.ts'
import { bootDisk, migrate, QemuGuest } from './qemu-guest.ts'

const tools = ['e2fsck', 'debugfs', 'nbdfuse', 'fio']

describe.skipIf(!canRunGuests() || !hasPrograms(...tools))('a guest on a volume (packages: see make-guest.sh)', () => {
  let disk: GuestDisk
  let folder: string
  const startedAt = performance.now()
  const step = (what: string): void => console.log(`${((performance.now() - startedAt) / 1000).toFixed(1)} s: ${what}`)

  beforeAll(async () => {
    disk = await guestDisk()
    folder = await mkdtemp(join(tmpdir(), 'atoll-guest-'))
    step('the disk is made')
  }, makeGuestLimitMs)
  afterAll(async () => {
    if (folder !== undefined) await rm(folder, { recursive: true, force: true })
  })

  test('boots, outlives kill -9 of the daemon, a snapshot and a migration under load, and comes back as of the snapshot', async () => {
    await using home = await TestHome.create()
    await home.start()
    await home.jsonMeanwhile('image', 'import', 'debian', disk.qcow2, '--format', 'qcow2')
    step('imported')
    home.cli('volume', 'create', 'root', '--from', 'image:debian')
    const blockdev = home.cli('volume', 'attach', 'root', '--format', 'qemu')

    await using guest = await QemuGuest.start({ name: 'first', folder, script: workload, devices: bootDisk(blockdev) })
    expect(await guest.hear('booted')).toMatch(/^\d+\.\d+.* from \/dev\/vda2$/)
    step('booted')
    const kept = await guest.hear('kept')
    await guest.hear('wrote', 5)
    await guest.hear('verified', 1)

    await home.end('SIGKILL')
    const writtenAtKill = guest.said('wrote').length
    await home.start()
    step(`daemon killed after ${writtenAtKill} files and started again`)
    // One file may have been under way, the rest was written by the new daemon.
    await guest.hear('wrote', writtenAtKill + 5)
    await guest.hear('verified', guest.said('verified').length + 1)
    step('the guest carries on')

    const before = guest.said('wrote')
    await home.snapshotMeanwhile('root@busy')
    // What the guest had said by then may still be in the pipe: all of it is read in a turn of the event loop.
    for (let turn = 0; turn < 3; turn += 1) await nextTurn()
    const after = guest.said('wrote')
    step(`snapshot between file ${before.length} and file ${after.length}`)
    await guest.hear('wrote', after.length + 5)

    const migrationSocket = join(folder, 'migration.sock')
    await using moved = await QemuGuest.start({
      name: 'second',
      folder,
      script: workload,
      devices: bootDisk(blockdev),
      incoming: migrationSocket,
    })
    const { totalMs, downtimeMs, movedBytes } = await migrate(guest, moved, migrationSocket)
    step(`migrated in ${totalMs} ms, ${downtimeMs} ms of them halted, ${(movedBytes / 2 ** 20).toFixed(0)} MiB moved`)
    await moved.hear('wrote', 5)
    await moved.hear('verified', 2)
    moved.tell('stop')
    expect(Number(await moved.hear('intact'))).toBeGreaterThanOrEqual(after.length + 10)
    step(`${await moved.hear('intact')} files are intact`)

    // What the guest trims is given back, by the attachment's own options; the journal and the directory may take a little.
    const usedBytes = (): number => home.json<{ usedBytes: number }>('volume', 'show', 'root').usedBytes
    const [beforeBytes, fileBytes] = [usedBytes(), 16 * 2 ** 20]
    moved.tell('grow')
    await moved.hear('grown')
    await expect.poll(usedBytes).toBeGreaterThanOrEqual(beforeBytes + fileBytes)
    const grownBytes = usedBytes()
    moved.tell('shrink')
    await moved.hear('shrunk')
    await expect.poll(usedBytes).toBeLessThanOrEqual(grownBytes - fileBytes + 2 ** 20)
    await moved.succeeds()
    step('shut down')
    for (const { console } of [guest, moved]) expect(console).not.toMatch(diskTrouble)

    // The root file system, as the guest that moved has left it.
    home.cli('volume', 'detach', 'root')
    await checkClean(home, 'root')

    home.cli('snapshot', 'rollback', 'root@busy')
    const again = home.cli('volume', 'attach', 'root', '--format', 'qemu')
    await using third = await QemuGuest.start({ name: 'third', folder, script: inventory, devices: bootDisk(again) })
    await third.hear('complete')
    await third.succeeds()
    step('booted after the rollback')
    expect(third.console).not.toMatch(diskTrouble)
    expect(third.said('kept')).toEqual([kept])
    const found = new Map(third.said('found').map((line) => line.split(' ') as [string, string]))
    // Every file that was said before the snapshot was asked for is there, and none that was begun after it was taken.
    for (const line of before) {
      const [number, checksum] = line.split(' ') as [string, string]
      expect(found.get(number), `file ${number}`).toBe(checksum)
    }
    for (const number of found.keys()) expect(Number(number)).toBeLessThanOrEqual(after.length + 1)

    home.cli('volume', 'detach', 'root')
    await checkClean(home, 'root')
    await checkSnapshot(home, kept)
    step('both file systems are clean')
  })

  /** The root file system of a volume that is shut down, looked at read-only through a mounted export. */
  async function checkClean(home: TestHome, volume: string): Promise<void> {
    const uri = home.cli('volume', 'attach', volume, '--read-only', '--format', 'uri')
    const mountpoint = join(folder, 'mounted')
    await mkdir(mountpoint, { recursive: true })
    {
      await using mounted = await mountExport(uri, mountpoint, '--readonly')
      const checked = await clientOutcome('e2fsck', '-f', '-n', `${mounted.path}?offset=${disk.rootOffsetBytes}`)
      expect(checked, checked.output).toMatchObject({ exitCode: 0 })
    }
    home.cli('volume', 'detach', volume)
  }

  /** The snapshot was taken while the guest wrote: its journal has work left, and after that it is as clean as any. */
  async function checkSnapshot(home: TestHome, kept: string): Promise<void> {
    home.cli('volume', 'create', 'past', '--from', 'snapshot:root@busy')
    const uri = home.cli('volume', 'attach', 'past', '--read-only', '--format', 'uri')
    const copy = join(folder, 'past.raw')
    await runClient('qemu-img', 'convert', '-f', 'raw', '-O', 'raw', uri, copy)
    home.cli('volume', 'detach', 'past')
    // The partition alone: e2fsck forgets about an offset when it opens a file system again after it replayed the journal.
    const root = join(folder, 'past-root.raw')
    await runClient('dd', `if=${copy}`, `of=${root}`, 'bs=1M', `skip=${disk.rootOffsetBytes}`, 'iflag=skip_bytes', 'conv=sparse')
    const replayed = await clientOutcome('e2fsck', '-p', root)
    expect(replayed.exitCode, replayed.output).toBeLessThanOrEqual(1)
    expect(await clientOutcome('e2fsck', '-f', '-n', root)).toMatchObject({ exitCode: 0 })
    const sums = join(folder, 'kept.sums')
    await runClient('debugfs', '-R', `dump /data/kept.sums ${sums}`, root)
    const found = createHash('sha256')
      .update(await readFile(sums))
      .digest('hex')
    expect(found).toBe(kept)
  }
})
