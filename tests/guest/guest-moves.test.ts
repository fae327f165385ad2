/** A virtual machine that writes and verifies its disk while that moves from files to Ceph and back. */
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { CephCluster, hasCeph } from '@atoll/southbound/ceph-cluster'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { TestHome } from '../test-home.ts'
import { canRunGuests, guestDisk, makeGuestLimitMs } from './guest-disk.ts'
import type { GuestDisk } from './guest-disk.ts'
import { diskTrouble, workload } from './guest-scripts.ts'
import { bootDisk, QemuGuest } from './qemu-guest.ts'

interface Moved {
  readonly job: { readonly result: { readonly copiedBytes: number; readonly pauseMs: number } }
}

describe.skipIf(!canRunGuests() || !hasCeph())('a guest on a volume that moves (packages: see make-guest.sh)', () => {
  let disk: GuestDisk
  let folder: string
  let cluster: CephCluster

  beforeAll(async () => {
    disk = await guestDisk()
    folder = await mkdtemp(join(tmpdir(), 'atoll-guest-'))
    cluster = await CephCluster.start()
  }, makeGuestLimitMs)
  afterAll(async () => {
    await cluster?.remove()
    if (folder !== undefined) await rm(folder, { recursive: true, force: true })
  })

  test('verifies what it writes all the way from files to Ceph and back, without an error', async () => {
    await using home = await TestHome.create()
    await home.start()
    const options = Object.entries(cluster.optionsIn('guest')).flatMap(([key, value]) => ['--option', `${key}=${value}`])
    home.cli('pool', 'create', 'far', '--driver', 'ceph', ...options)
    await home.jsonMeanwhile('image', 'import', 'debian', disk.qcow2, '--format', 'qcow2')
    home.cli('volume', 'create', 'root', '--from', 'image:debian')
    home.cli('image', 'delete', 'debian')
    const blockdev = home.cli('volume', 'attach', 'root', '--format', 'qemu')
    await using guest = await QemuGuest.start({ name: 'moving', folder, script: workload, devices: bootDisk(blockdev) })
    await guest.hear('wrote', 5)
    await guest.hear('verified', 1)
    for (const target of ['far', 'default']) {
      const { job } = await home.jsonMeanwhile<Moved>('migrate', 'root', '--to', target, '--wait')
      console.log(`to ${target}:`, job.result, `${guest.said('wrote').length} files so far`)
      expect(home.json<object>('volume', 'show', 'root')).toMatchObject({ pool: target, readsFrom: [] })
      // One of each may have been under way.
      await guest.hear('wrote', guest.said('wrote').length + 5)
      await guest.hear('verified', guest.said('verified').length + 2)
    }
    guest.tell('stop')
    expect(Number(await guest.hear('intact'))).toBeGreaterThanOrEqual(15)
    for (const [word, answer] of [
      ['grow', 'grown'],
      ['shrink', 'shrunk'],
    ] as const) {
      guest.tell(word)
      await guest.hear(answer)
    }
    await guest.succeeds()
    expect(guest.console).not.toMatch(diskTrouble)
    home.cli('volume', 'detach', 'root')
    home.cli('pool', 'reclaim', 'far')
    expect(home.json<{ storedBytes: number }>('pool', 'show', 'far').storedBytes).toBe(0)
    expect(home.json<{ findings: unknown[] }>('check').findings).toEqual([])
  })
})
