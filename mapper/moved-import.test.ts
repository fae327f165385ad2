/** Pools between which volumes are moved, whose catalog is lost at some point of the move. */
import { randomUUID } from 'node:crypto'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { adminProject, type Catalog, type JsonObject, openCatalog } from '@atoll/core'
import { Engine } from '@atoll/native'
import { type Driver, fileDriver, type PoolHandle } from '@atoll/southbound'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { loadExport } from './export-load.ts'
import { type Mapper, openMapper } from './mapper.ts'
import { bytes, LogLines, slot } from './test-bench.ts'

const projectId = adminProject.id
const phases = ['freeze', 'claim', 'fill', 'home', 'drop'] as const
type Phase = (typeof phases)[number]

describe('the pools of a lost catalog that was moving a volume', () => {
  let folder: string
  const closing: (() => Promise<void>)[] = []
  /** By volume. */
  const jobIds = new Map<string, string>()
  /** Pools whose exports cannot be written any more. */
  const stuck = new Set<string>()

  beforeEach(async () => {
    folder = await mkdtemp(join(tmpdir(), 'atoll-moved-'))
  })
  afterEach(async () => {
    for (const close of closing.splice(0).toReversed()) await close()
    stuck.clear()
    await rm(folder, { recursive: true })
  })

  /** The file driver, whose records fail to be written where a test says so. */
  const driver: Driver = {
    ...fileDriver,
    open: async (context) => withStuckRecords(await fileDriver.open(context), () => stuck.has(context.options['path'] ?? '')),
  }
  const pathOf = (name: string): string => join(folder, name)
  const place = (name: string) => ({ driver: 'file', options: { path: pathOf(name), reserve: '0' } })
  const importOf = (name: string) => ({ name, ...place(name), takeOver: true, dryRun: false })

  async function home(): Promise<{ mapper: Mapper; catalog: Catalog; end: () => Promise<void> }> {
    const engine = new Engine()
    const catalog = await openCatalog(':memory:')
    const mapper = await openMapper({ catalog, engine, drivers: [driver], log: new LogLines(), setTimer: () => () => undefined })
    let isClosed = false
    const end = async (): Promise<void> => {
      if (isClosed) return
      isClosed = true
      await mapper.close()
      await engine.close()
      await catalog.close()
    }
    closing.push(end)
    return { mapper, catalog, end }
  }

  async function read(mapper: Mapper, id: string): Promise<Buffer> {
    const { device } = await mapper.open(id, { holder: 'test', readOnly: true })
    try {
      return Buffer.from(await device.read(0, 6 * slot))
    } finally {
      await mapper.close(id)
    }
  }

  /** `disk` of the pool `old` with a snapshot and a clone, moved to `new` up to a phase, and written after every one. */
  async function lostAfter(last: Phase, before: (phase: Phase) => void = () => undefined) {
    const { mapper, catalog, end } = await home()
    const old = await mapper.pools.create({ projectId, name: 'old', ...place('old') })
    const target = await mapper.pools.create({ projectId, name: 'new', ...place('new') })
    const disk = await mapper.createVolume({ projectId, name: 'disk', sizeBytes: 64 * slot, poolId: old.id })
    const { device } = await mapper.open(disk.id, { holder: 'test', readOnly: false })
    await device.write(0, bytes(1, 4 * slot))
    const { rows } = await mapper.snapshot([{ volumeId: disk.id, name: 'snap' }])
    const snapshotId = rows[0]?.id ?? ''
    await device.write(0, bytes(2))
    const clone = await mapper.createVolume({
      projectId,
      name: 'clone',
      sizeBytes: 64 * slot,
      poolId: old.id,
      fromId: snapshotId,
    })
    const content = Buffer.concat([bytes(2), bytes(1, 3 * slot), bytes(0, 2 * slot)])
    const request = { jobId: randomUUID(), volumeId: disk.id, targetPoolId: target.id, withSnapshots: true }
    await addJob(catalog, request)
    for (const [index, phase] of phases.slice(0, phases.indexOf(last) + 1).entries()) {
      before(phase)
      await run(mapper, request, phase)
      await device.write((1 + index) * slot, bytes(10 + index))
      content.fill(10 + index, (1 + index) * slot, (2 + index) * slot)
    }
    // Flushed, but not in the catalog as a checkpoint: only the journal in the pool where it writes has it.
    await device.flush()
    return { mapper, end, old, target, disk: disk.id, snapshotId, clone: clone.id, content }
  }
  const ofSnapshot = Buffer.concat([bytes(1, 4 * slot), bytes(0, 2 * slot)])

  for (const last of phases) {
    for (const order of [
      ['old', 'new'],
      ['new', 'old'],
    ]) {
      test(`after ${last}: are imported in the order ${order.join(', ')}, with a reclaim after each`, async () => {
        const { end, disk, snapshotId, clone, content } = await lostAfter(last)
        await end()
        const { mapper } = await home()
        for (const name of order) {
          await mapper.importPool(importOf(name))
          await mapper.reclaim(null)
        }
        expect(await read(mapper, disk)).toEqual(content)
        expect(await read(mapper, snapshotId)).toEqual(ofSnapshot)
        expect(await read(mapper, clone)).toEqual(ofSnapshot)
        const { device } = await mapper.open(disk, { holder: 'test', readOnly: false })
        await device.write(0, bytes(77))
        await mapper.close(disk)
        await mapper.reclaim(null)
        expect(await read(mapper, disk)).toEqual(Buffer.concat([bytes(77), content.subarray(slot)]))
        expect(await read(mapper, clone)).toEqual(ofSnapshot)
        const { findings } = await mapper.check({ deep: true })
        expect(findings.filter((finding) => finding.severity !== 'note')).toEqual([])
      })
    }
  }

  test('without the one that it writes into the volume is there, named, and cannot be opened', async () => {
    const { end, disk, snapshotId, clone } = await lostAfter('fill')
    await end()
    const { mapper, catalog } = await home()
    const report = await mapper.importPool(importOf('old'))
    expect(report.missingSources).toMatchObject([{ name: 'new' }])
    expect(report.failed).toMatchObject([{ id: disk, kind: 'volume', code: 'LAYER_MISSING' }])
    expect(report.failed[0]?.reason).toContain('import pool "new"')
    expect(report.broughtBack).toMatchObject({ volume: 1, snapshot: 1 })
    await expect(mapper.open(disk, { holder: 'test', readOnly: false })).rejects.toMatchObject({ code: 'LAYER_MISSING' })
    expect(await read(mapper, snapshotId)).toEqual(ofSnapshot)
    expect(await read(mapper, clone)).toEqual(ofSnapshot)
    const kinds = (await mapper.check()).findings.map((finding) => finding.kind)
    expect(kinds).toContain('volume-waiting')
    expect(kinds).not.toContain('volume-row-missing')
    expect(await catalog.db.selectFrom('volumes').select('id').execute()).toEqual([{ id: clone }])
  })

  for (const order of [
    ['old', 'new'],
    ['new', 'old'],
  ]) {
    test(`a volume that stands in the exports of both is where it came to, in the order ${order.join(', ')}`, async () => {
      // The export of the pool that it leaves is not written any more.
      const moved = await lostAfter('home', (phase) => {
        if (phase === 'home') stuck.add(pathOf('old'))
      })
      const stores = await Promise.all(
        [moved.old, moved.target].map(async (pool) => (await moved.mapper.pools.handle(pool.id)).store),
      )
      const epochs = await Promise.all(
        stores.map(async (store) => (await loadExport(store))?.rows.get('resources')?.get(moved.disk)?.row['home_epoch']),
      )
      expect(epochs).toEqual([0, 1])
      await moved.end()
      stuck.clear()
      const { mapper, catalog } = await home()
      for (const name of order) {
        await mapper.importPool(importOf(name))
        await mapper.reclaim(null)
      }
      const row = await catalog.db.selectFrom('resources').selectAll().where('id', '=', moved.disk).executeTakeFirstOrThrow()
      expect(row).toMatchObject({ home_pool_id: moved.target.id, home_epoch: 1, kind: 'volume' })
      expect(await read(mapper, moved.disk)).toEqual(moved.content)
      expect(await read(mapper, moved.snapshotId)).toEqual(ofSnapshot)
      expect(await read(mapper, moved.clone)).toEqual(ofSnapshot)
    })
  }

  test('what leaves a pool stays in its export until that of the other pool has it, and nothing of it is freed before', async () => {
    const { mapper, old, target, disk } = await lostAfter('fill', (phase) => {
      if (phase === 'fill') stuck.add(pathOf('new'))
    })
    const jobId = jobIds.get(disk) ?? ''
    await mapper.moves.home({ jobId, volumeId: disk, targetPoolId: target.id, withSnapshots: true })
    const { store } = await mapper.pools.handle(old.id)
    expect((await loadExport(store))?.rows.get('resources')?.has(disk)).toBe(true)
    expect(await mapper.flushExports([old.id])).toBe(false)
    stuck.clear()
    expect(await mapper.flushExports([old.id, target.id])).toBe(true)
    expect((await loadExport(store))?.rows.get('resources')?.has(disk)).toBe(false)
  })

  async function addJob(catalog: Catalog, request: { jobId: string; volumeId: string; targetPoolId: string }): Promise<void> {
    jobIds.set(request.volumeId, request.jobId)
    const params: JsonObject = { targetPoolId: request.targetPoolId, withSnapshots: true }
    const rest = { progress_bytes: 0, total_bytes: null, cursor: null, result: null, error_code: null, error_message: null }
    const job = { id: request.jobId, project_id: projectId, kind: 'migrate', subject: request.volumeId, params } as const
    await catalog.write(
      async (tx) =>
        await tx
          .insertInto('jobs')
          .values({ ...job, ...rest, state: 'running', created_at: 1, updated_at: 1 })
          .execute(),
    )
  }
})

async function run(mapper: Mapper, request: Parameters<Mapper['moves']['freeze']>[0], phase: Phase): Promise<void> {
  const { moves } = mapper
  if (phase === 'freeze') await moves.freeze(request, { deadlineMs: 60_000 })
  else if (phase === 'claim') await moves.claim(request)
  else if (phase === 'home') await moves.home(request)
  else if (phase === 'drop') await moves.drop(request, {})
  else {
    for (let cursor: JsonObject | null = null, isDone = false; !isDone;) {
      const piece = await moves.fillNext(request, cursor, { limitBytesPerSecond: null })
      cursor = piece.cursor
      isDone = piece.isDone
    }
  }
}

function withStuckRecords(handle: PoolHandle, isStuck: () => boolean): PoolHandle {
  const store = new Proxy(handle.store, {
    get(target, key) {
      if (key === 'writeRecord' && isStuck()) {
        return async () => {
          throw new Error('the backend does not answer')
        }
      }
      const value: unknown = Reflect.get(target, key, target)
      return typeof value === 'function' ? (value.bind(target) as unknown) : value
    },
  })
  return new Proxy(handle, {
    get(target, key) {
      if (key === 'store') return store
      const value: unknown = Reflect.get(target, key, target)
      return typeof value === 'function' ? (value.bind(target) as unknown) : value
    },
  })
}
