import { join } from 'node:path'
import { connect, NbdError, type NbdConnection } from '@atoll/nbd-client'
import { describe, expect, test } from 'vitest'
import { TestHome } from '../test-home.ts'
import { attach, expectServed, makeOther, mebibyte, pattern, show, slotBytes } from './broken-home.ts'
import { SmallDisk, whyNoSmallDisk } from './small-disk.ts'

const diskBytes = 192 * mebibyte
const reason = await whyNoSmallDisk()
if (reason !== null) console.log(`the tests of a full home are skipped: ${reason}`)

describe.skipIf(reason !== null)('a home on a full disk', () => {
  test('fails writes with ENOSPC and nothing else, also over kill -9, and a delete gives the space back', async () => {
    await using disk = await SmallDisk.mount(diskBytes)
    await using home = TestHome.at(disk.path, { logPath: join(disk.outside, 'log') })
    await home.start()
    await makeOther(home)
    // Slots that belong to the snapshot's layer: what is written there goes through the journal.
    home.cli('volume', 'create', 'disk', '--size', '1G')
    let client = await attach(home, 'disk')
    await client.write(0, pattern(1, 24 * mebibyte))
    await client.write(24 * mebibyte, pattern(8, 24 * mebibyte))
    await client.flush()
    await home.jsonMeanwhile('snapshot', 'create', 'disk@before')
    await client.write(0, pattern(2, 20 * mebibyte))
    await client.write(24 * mebibyte, pattern(9, 24 * mebibyte))
    await client.flush()

    const fullAt = await fill(client, disk, 64 * mebibyte)
    for (let again = 0; again < 4; again += 1) await expectNoSpace(client.write(fullAt, pattern(4, mebibyte)))
    expect(await client.read(0, 24 * mebibyte)).toEqual(Buffer.concat([pattern(2, 20 * mebibyte), before(20, 4)]))
    // In place, so no space is needed.
    await client.write(0, pattern(5, mebibyte))
    await client.flush()
    expect(show(home, 'disk')).toMatchObject({ status: 'in-use', error: null })
    expect(home.json('pool', 'show', 'default')).toMatchObject({ lowSpace: true, lowSpaceBytes: Math.floor(diskBytes / 10) })
    expect(home.json('status')).toMatchObject({ lowSpacePools: ['default'] })
    expect((await home.log()).match(/running out of space/g)).toHaveLength(1)
    expect(home.fail('snapshot', 'create', 'disk@never')).toBe('NO_SPACE')
    expect(home.fail('volume', 'create', 'never', '--size', '1G')).toBe('NO_SPACE')
    expect(home.json<{ name: string }[]>('snapshot', 'list', 'disk').map(({ name }) => name)).toEqual(['before'])
    await expectReadable(home)

    const content = Buffer.concat([pattern(5, mebibyte), pattern(2, 20 * mebibyte).subarray(mebibyte), before(20, 4)])
    for (const round of [1, 2]) {
      await home.end('SIGKILL')
      await home.start()
      client = await attach(home, 'disk')
      expect(await client.read(0, 24 * mebibyte), `after kill ${round}`).toEqual(content)
      expect(show(home, 'disk')).toMatchObject({ status: 'in-use', error: null })
      await expectReadable(home)
    }

    // A reclaim alone is recorded and ends; it finds nothing, because everything is still referred to.
    home.cli('pool', 'reclaim', 'default')
    const { storedBytes } = home.json<{ storedBytes: number }>('pool', 'show', 'default')
    home.cli('snapshot', 'delete', 'disk@before')
    // Most of the snapshot's slots were overwritten, and nobody else has them. They are free once the volume's map has been written
    // down, which happens every few seconds. On the disk it may be less: the catalog's reserve takes back what it gave.
    await expect
      .poll(() => {
        expect(home.json<{ state: string }>('pool', 'reclaim', 'default').state).toBe('done')
        return storedBytes - home.json<{ storedBytes: number }>('pool', 'show', 'default').storedBytes
      })
      .toBeGreaterThan(43 * mebibyte)
    expect(await disk.freeBytes()).toBeGreaterThan(20 * mebibyte)
    await client.write(fullAt, pattern(6, mebibyte))
    await client.flush()
    expect(await client.read(fullAt, mebibyte)).toEqual(pattern(6, mebibyte))
    expect(await client.read(0, 24 * mebibyte)).toEqual(content)

    // The volume that filled the disk can be given up while it is full again.
    await fill(client, disk, fullAt + mebibyte)
    await client.disconnect()
    home.cli('volume', 'detach', 'disk')
    home.cli('volume', 'delete', 'disk')
    expect(home.json<{ state: string }>('pool', 'reclaim', 'default').state).toBe('done')
    expect(await disk.freeBytes()).toBeGreaterThan(80 * mebibyte)
    home.cli('volume', 'create', 'next', '--size', '1G')
    await using next = await attach(home, 'next')
    await next.write(0, pattern(7, 16 * mebibyte))
    await next.flush()
    await expectServed(home)
    expect(await home.end()).toBe(0)
  })

  test('can be left by clients that have only given space up', async () => {
    await using disk = await SmallDisk.mount(diskBytes)
    await using home = TestHome.at(disk.path, { logPath: join(disk.outside, 'log') })
    await home.start()
    home.cli('volume', 'create', 'disk', '--size', '1G')
    const client = await attach(home, 'disk')
    await client.write(0, pattern(1, 8 * mebibyte))
    await client.flush()
    await home.jsonMeanwhile('snapshot', 'create', 'disk@before')
    await fill(client, disk, 64 * mebibyte)
    // Owners change without any data: batch log and journal need the space that there is not.
    for (let index = 0; index < 512; index += 1) {
      await client.trim(index * 2 * slotBytes, slotBytes).catch(requireNoSpace)
    }
    await client.flush().catch(requireNoSpace)
    await home.end('SIGKILL')
    await home.start()
    expect(show(home, 'disk')).toMatchObject({ status: 'in-use', error: null })
    home.cli('volume', 'detach', 'disk')
    home.cli('volume', 'delete', 'disk', '--with-snapshots')
    home.cli('pool', 'reclaim', 'default')
    expect(await disk.freeBytes()).toBeGreaterThan(80 * mebibyte)
  })
})

/** What the snapshot `before` has from `fromMebibyte` on. */
function before(fromMebibyte: number, lengthMebibyte: number): Buffer {
  return pattern(1, 24 * mebibyte).subarray(fromMebibyte * mebibyte, (fromMebibyte + lengthMebibyte) * mebibyte)
}

/** Writes fresh slots from `offsetBytes` on until none fits any more; returns where the first write failed. */
async function fill(client: NbdConnection, disk: SmallDisk, offsetBytes: number): Promise<number> {
  let at = offsetBytes
  try {
    for (; at < client.sizeBytes - 4 * mebibyte; at += mebibyte) await client.write(at, pattern(3, mebibyte))
  } catch (error) {
    requireNoSpace(error)
  }
  // What is left are pieces: the last ones go, too.
  let freeBytes = await disk.freeBytes()
  for (let slot = 0; slot < 1024 && freeBytes > 0; slot += 1) {
    await client.write(at + 2 * mebibyte + slot * slotBytes, pattern(3, slotBytes)).catch(requireNoSpace)
    freeBytes = await disk.freeBytes()
  }
  // Not asked again: a map that is written down just now gives back the journal before it.
  expect(freeBytes).toBe(0)
  return at
}

function requireNoSpace(error: unknown): void {
  expect(error).toBeInstanceOf(NbdError)
  expect(error).toMatchObject({ code: 'NBD_REQUEST_FAILED', errnoName: 'ENOSPC' })
}

async function expectNoSpace(write: Promise<unknown>): Promise<void> {
  await expect(write).rejects.toMatchObject({ code: 'NBD_REQUEST_FAILED', errnoName: 'ENOSPC' })
}

/** On a full disk the other volume is served, but it gets no new space either. */
async function expectReadable(home: TestHome): Promise<void> {
  expect(show(home, 'other')).toMatchObject({ status: 'in-use', error: null })
  await using other = await connect(show(home, 'other').attachments[0]?.uri ?? '')
  expect(await other.read(0, mebibyte)).toEqual(pattern(0x5a, mebibyte))
  await other.write(0, pattern(0x5a, mebibyte))
  await other.flush()
}
