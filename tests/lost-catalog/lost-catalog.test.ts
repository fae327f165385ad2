/** The catalog is gone: what the real daemon says, and what `atoll pool import` brings back. */
import { readdir, readFile, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { attach, mebibyte, pattern, poolPath, slotBytes } from '../faults/broken-home.ts'
import { TestHome } from '../test-home.ts'

interface Imported {
  readonly poolId: string
  readonly catalogId: string
  readonly broughtBack: Record<string, number>
  readonly failed: readonly { readonly name: string; readonly code: string; readonly reason: string }[]
  readonly damages: readonly { readonly record: string }[]
  readonly unknownLayers: readonly string[]
}

interface ShownPool {
  readonly id: string
  readonly name: string
  readonly error: { readonly code: string; readonly message: string } | null
  readonly export: { readonly state: string } | null
}

/** What a disk that died, or a wrong `rm`, leaves of a home. */
async function loseCatalog(home: TestHome): Promise<void> {
  for (const name of await readdir(home.path)) if (name.startsWith('catalog.')) await rm(join(home.path, name))
}

/** A volume with a snapshot of something older than what it holds. */
async function fill(home: TestHome): Promise<void> {
  home.cli('volume', 'create', 'disk', '--size', '32M')
  await using client = await attach(home, 'disk')
  await client.write(0, pattern(1, mebibyte))
  await client.flush()
  home.cli('snapshot', 'create', 'disk@before')
  await client.write(0, pattern(2, slotBytes))
  await client.flush()
}

async function expectFilled(home: TestHome): Promise<void> {
  await using client = await attach(home, 'disk')
  expect(await client.read(0, slotBytes)).toEqual(pattern(2, slotBytes))
  expect(await client.read(slotBytes, slotBytes)).toEqual(pattern(1, mebibyte).subarray(slotBytes, 2 * slotBytes))
  home.cli('volume', 'create', 'old', '--from', 'snapshot:disk@before')
  await using old = await attach(home, 'old')
  expect(await old.read(0, mebibyte)).toEqual(pattern(1, mebibyte))
}

test('after kill -9 and the loss of the catalog the daemon starts, names the command, and the import brings everything back', async () => {
  await using home = await TestHome.create()
  await home.start()
  await fill(home)
  await home.end('SIGKILL')
  await loseCatalog(home)

  await home.start()
  const foreign = home.json<ShownPool>('pool', 'show', 'default')
  expect(foreign.error?.code).toBe('POOL_OWNED_BY_OTHER')
  expect(await home.log()).toContain('atoll pool import default --take-over')
  expect(home.fail('volume', 'create', 'new', '--size', '1M')).toBe('POOL_UNAVAILABLE')
  const refused = home.failure('pool', 'import', 'default')
  expect(refused.code).toBe('POOL_OWNED_BY_OTHER')
  expect(refused.message).toContain('1 volumes, 1 snapshots')
  const before = await readdir(poolPath(home, 'records'))
  expect(home.json<Imported>('pool', 'import', 'default', '--dry-run').broughtBack).toMatchObject({ volume: 1, snapshot: 1 })
  expect(await readdir(poolPath(home, 'records'))).toEqual(before)

  const report = home.json<Imported>('pool', 'import', 'default', '--take-over')
  expect(report).toMatchObject({
    broughtBack: { volume: 1, snapshot: 1, image: 0, file: 0 },
    failed: [],
    damages: [],
    unknownLayers: [],
  })
  expect(home.json<ShownPool>('pool', 'show', 'default')).toMatchObject({
    id: report.poolId,
    error: null,
    export: { state: 'current' },
  })
  await expectFilled(home)

  // A second loss, of the new catalog: the pool exports itself under that one now.
  await home.end('SIGKILL')
  await loseCatalog(home)
  await home.start()
  expect(home.json<Imported>('pool', 'import', 'default', '--take-over').broughtBack).toMatchObject({ volume: 2, snapshot: 1 })
  await using client = await attach(home, 'old')
  expect(await client.read(0, mebibyte)).toEqual(pattern(1, mebibyte))
})

test('a pool that a living daemon has open is refused whatever is asked', async () => {
  await using owner = await TestHome.create()
  await owner.start()
  await fill(owner)
  await using home = await TestHome.create()
  await home.start()
  const option = `path=${poolPath(owner)}`
  const refused = home.failure('pool', 'import', 'taken', '--driver', 'file', '--option', option, '--take-over')
  expect(refused.code).toBe('POOL_LOCKED')
  await expectFilled(owner)

  // Its daemon stopped, it is a pool beside the home's own, whose spare layers make room.
  await owner.end()
  const report = home.json<Imported>('pool', 'import', 'taken', '--driver', 'file', '--option', option, '--take-over')
  expect(report).toMatchObject({ broughtBack: { volume: 2, snapshot: 1 }, failed: [] })
  await using client = await attach(home, 'old')
  expect(await client.read(0, mebibyte)).toEqual(pattern(1, mebibyte))
  // The other daemon has lost it for good.
  await home.end()
  await owner.start()
  expect(owner.json<ShownPool>('pool', 'show', 'default').error?.code).toBe('POOL_OWNED_BY_OTHER')
})

test('a damaged record is named, and what is intact comes back', async () => {
  await using home = await TestHome.create()
  await home.start()
  await fill(home)
  // What it holds is in older records: no checkpoint of it is in the last one.
  home.cli('volume', 'detach', 'disk')
  home.cli('volume', 'create', 'late', '--size', '1M')
  await home.end('SIGKILL')
  const names = (await readdir(poolPath(home, 'records'))).filter((name) => name.startsWith('export.delta.')).toSorted()
  const last = poolPath(home, 'records', names.at(-1) ?? '')
  const bytes = await readFile(last)
  bytes.writeUInt8(bytes.readUInt8(100) ^ 1, 100)
  await writeFile(last, bytes)
  await loseCatalog(home)
  await home.start()
  const result = home.run('pool', 'import', 'default', '--take-over', '--json')
  expect(result.exitCode).toBe(1)
  const report = JSON.parse(result.stdout) as Imported
  expect(report.damages.map(({ record }) => record)).toEqual([names.at(-1)])
  expect(report.broughtBack).toMatchObject({ snapshot: 1 })
  await expectFilled(home)
})
