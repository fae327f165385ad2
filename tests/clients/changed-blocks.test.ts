/** What changed since a snapshot, as libnbd's and QEMU's tools read it: incremental backup without a full read. */
import { randomFillSync } from 'node:crypto'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { connect } from '@atoll/nbd-client'
import { hasPrograms } from '../cli/test-programs.ts'
import { ClientStand, diskBytes, KiB, MiB } from './client-stand.ts'
import { runClient } from './run-client.ts'

const slot = 4 * KiB

let stand: ClientStand
beforeAll(async () => {
  stand = await ClientStand.create()
})
afterAll(async () => {
  await stand?.[Symbol.asyncDispose]()
})

/** Ranges of a context that have these flags, as nbdinfo shows them. */
async function ranges(uri: string, context: string, type: number): Promise<[offset: number, length: number][]> {
  const map = JSON.parse(await runClient('nbdinfo', '--json', `--map=${context}`, uri)) as Record<string, number>[]
  return map.filter((entry) => entry['type'] === type).map((entry) => [entry['offset']!, entry['length']!])
}

/** A clone with a snapshot `monday`, and what was written, zeroed and discarded since. */
async function makeChanged(name: string): Promise<{ uri: string; changed: [number, number][] }> {
  const uri = stand.clone(name)
  {
    await using disk = await connect(uri)
    await disk.write(50 * MiB, randomFillSync(Buffer.alloc(MiB)))
    await disk.flush()
  }
  stand.home.cli('snapshot', 'create', `${name}@monday`)
  await using disk = await connect(uri)
  await disk.write(5 * slot + 100, Buffer.from('a few bytes'))
  await disk.write(50 * MiB, randomFillSync(Buffer.alloc(2 * slot)))
  await disk.trim(20 * MiB, 2 * slot)
  await disk.writeZeroes(41 * MiB, slot)
  // A discard is a change, also where nothing had been written: what a file holds decides nothing.
  await disk.trim(60 * MiB, MiB)
  await disk.flush()
  const changed: [number, number][] = [
    [5 * slot, slot],
    [20 * MiB, 2 * slot],
    [41 * MiB, slot],
    [50 * MiB, 2 * slot],
    [60 * MiB, MiB],
  ]
  return { uri, changed }
}

describe.skipIf(!hasPrograms('nbdinfo'))('nbdinfo (package libnbd-bin)', () => {
  test('maps what changed since a snapshot, to the slot, also after a restart', async () => {
    const { uri, changed } = await makeChanged('dirty')
    expect(await ranges(uri, 'qemu:dirty-bitmap:monday', 1)).toEqual(changed)
    stand.home.cli('snapshot', 'create', 'dirty@tuesday')
    expect(await ranges(uri, 'qemu:dirty-bitmap:tuesday', 1)).toEqual([])
    expect(await ranges(uri, 'qemu:dirty-bitmap:monday', 1)).toEqual(changed)
    await stand.crash()
    expect(await ranges(uri, 'qemu:dirty-bitmap:monday', 1)).toEqual(changed)
  })

  test('maps what the volume holds itself, and what it shares', async () => {
    const { uri } = await makeChanged('depth')
    const own = await ranges(uri, 'qemu:allocation-depth', 1)
    expect(own).toEqual([
      [5 * slot, slot],
      [50 * MiB, 2 * slot],
    ])
    const shared = await ranges(uri, 'qemu:allocation-depth', 2)
    expect(shared[0]).toEqual([0, 5 * slot])
    const covered = await Promise.all([0, 1, 2].map((depth) => ranges(uri, 'qemu:allocation-depth', depth)))
    expect(covered.flat().reduce((sum, [, length]) => sum + length, 0)).toBe(diskBytes)
  })

  test('lists the contexts that there are, with every snapshot', async () => {
    const uri = stand.clone('listing')
    stand.home.cli('snapshot', 'create', 'listing@one')
    stand.home.cli('snapshot', 'create', 'listing@two')
    const [shown] = (JSON.parse(await runClient('nbdinfo', '--json', uri)) as { exports: { contexts: string[] }[] }).exports
    expect(shown?.contexts).toEqual([
      'base:allocation',
      'qemu:allocation-depth',
      'qemu:dirty-bitmap:one',
      'qemu:dirty-bitmap:two',
    ])
  })
})

describe.skipIf(!hasPrograms('qemu-img'))('qemu-img (package qemu-utils)', () => {
  test('reads the same through x-dirty-bitmap', async () => {
    const { uri, changed } = await makeChanged('qemu')
    const socketPath = new URL(uri).searchParams.get('socket')
    const options = [
      'driver=nbd',
      'server.type=unix',
      `server.path=${socketPath}`,
      `export=${new URL(uri).pathname.slice(1)}`,
      'x-dirty-bitmap=qemu:dirty-bitmap:monday',
    ]
    const map = JSON.parse(await runClient('qemu-img', 'map', '--output=json', '--image-opts', options.join(','))) as Record<
      string,
      unknown
    >[]
    // qemu shows what is dirty as not there.
    const dirty = map.filter((entry) => entry['data'] === false).map((entry) => [entry['start'], entry['length']])
    expect(dirty).toEqual(changed)
  })
})

test('a snapshot that is deleted and swept goes on being compared with by who has selected it', async () => {
  const { uri, changed } = await makeChanged('deleted')
  const context = 'qemu:dirty-bitmap:monday'
  await using disk = await connect(uri, { metaContexts: [context] })
  expect([...disk.metaContexts.keys()]).toEqual([context])
  stand.home.cli('snapshot', 'delete', 'deleted@monday')
  stand.home.cli('pool', 'reclaim', 'default')
  stand.home.cli('snapshot', 'create', 'deleted@later')
  await disk.write(62 * MiB, Buffer.alloc(slot, 1))
  const extents = (await disk.blockStatus(0, diskBytes)).get(context) ?? []
  const found = extents.filter(({ flags }) => flags === 1).map(({ offsetBytes, lengthBytes }) => [offsetBytes, lengthBytes])
  expect(found).toEqual([...changed, [62 * MiB, slot]])
  await using after = await connect(uri, { metaContexts: [context] })
  expect(after.metaContexts.size).toBe(0)
})
