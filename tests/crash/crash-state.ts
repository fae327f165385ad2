/** Brings one crash state back to life and compares it with what is possible. */
import assert from 'node:assert/strict'
import { type Catalog, openCatalog, type ResourceRow, silentLog } from '@atoll/core'
import { openMapper, type Mapper } from '@atoll/mapper'
import { type Device, Engine, type Store } from '@atoll/native'
import { findLeak } from './audit.ts'
import { givenStoreDriver } from './given-store-driver.ts'
import type { Model } from './model.ts'

export interface CrashState {
  readonly catalogBytes: Uint8Array
  /** Makes the image of the store in the engine that will use it. */
  readonly image: (engine: Engine) => Store
  readonly context: string
  /** What the pool's export had when it was written last, while it cannot be; undefined: it has all that `model` has. */
  readonly exported: Model | undefined
  /** The last event of the store before the crash. */
  readonly sequence: number
}

interface Revived {
  readonly mapper: Mapper
  readonly catalog: Catalog
  readonly engine: Engine
  readonly store: Store
}

export interface CheckDepth {
  /** Also: the catalog is lost, and the pool is imported into a fresh one. */
  readonly import: boolean
  /** Also: reclaim, then allocated == reachable, and everything as before. */
  readonly reclaim: boolean
  /** Also: a partial write to every slot, a snapshot, a flush and a second life. */
  readonly live: boolean
}

/** @throws AssertionError that begins with the context */
export async function checkCrashState(state: CrashState, model: Model, depth: CheckDepth): Promise<void> {
  const engine = new Engine()
  try {
    const catalog = await openCatalog(state.catalogBytes)
    try {
      const store = state.image(engine)
      const mapper = await openMapper({
        catalog,
        engine,
        drivers: [givenStoreDriver(store)],
        log: silentLog(),
        setTimer: () => () => {},
      })
      try {
        await checkExports(state, mapper)
        const { findings } = await mapper.check()
        assert.deepEqual(
          findings.filter(({ severity }) => severity !== 'note'),
          [],
          state.context,
        )
        const rows = await catalog.db.selectFrom('resources').selectAll().where('status', '=', 'available').execute()
        checkExistence(state, model, rows)
        const found = await readAll(mapper, rows)
        for (const row of rows) checkContent(state, model, row, found)
        if (depth.reclaim) await checkReclaim(state, { mapper, catalog, engine, store }, rows, found)
        if (depth.live) await checkLife(state, mapper, rows, found)
      } finally {
        await mapper.close()
      }
    } finally {
      await catalog.close()
    }
  } catch (error) {
    if (error instanceof assert.AssertionError) throw error
    throw new assert.AssertionError({ message: `${state.context}: ${String((error as Error).stack)}` })
  } finally {
    await engine.close()
  }
  if (depth.import) await checkImport(state, state.exported ?? model)
}

/** An export is written from what is durable only, so no crash leaves one that is ahead of its catalog. */
async function checkExports(state: CrashState, mapper: Mapper): Promise<void> {
  for (const pool of await mapper.pools.list()) {
    const { export: exported } = await mapper.pools.status(pool.id)
    assert.notEqual(exported.state, 'ahead', `${state.context}: the export is ahead of the catalog`)
  }
}

/** What an operation promised is in the pool's export, too: the same must be found without the catalog. */
async function checkImport(state: CrashState, model: Model): Promise<void> {
  const imported = { ...state, context: `${state.context}, imported` }
  const engine = new Engine()
  const catalog = await openCatalog(':memory:')
  try {
    const store = state.image(engine)
    const log = silentLog()
    const mapper = await openMapper({ catalog, engine, drivers: [givenStoreDriver(store)], log, setTimer: () => () => {} })
    try {
      const wanted = { name: 'crash', driver: 'memory', options: {}, takeOver: true, dryRun: false }
      const report = await mapper.importPool(wanted)
      // What was being written as a whole and was not finished does not come back.
      const failed = report.failed.filter(({ code }) => code !== 'RESOURCE_STATUS')
      assert.deepEqual(failed, [], `${imported.context}: not brought back`)
      const all = await catalog.db.selectFrom('resources').selectAll().execute()
      // Of an older export only what never changes is compared: it must be whole, also what was deleted and reclaimed since.
      const rows = state.exported === undefined ? all : all.filter((row) => row.kind === 'snapshot')
      checkExistence(imported, model, rows)
      const found = await readAll(mapper, rows)
      for (const row of rows) checkContent(imported, model, row, found)
    } finally {
      await mapper.close()
    }
  } catch (error) {
    if (error instanceof assert.AssertionError) throw error
    throw new assert.AssertionError({ message: `${imported.context}: ${String((error as Error).stack)}` })
  } finally {
    await catalog.close()
    await engine.close()
  }
}

export function checkExistence(state: Pick<CrashState, 'context'>, model: Model, rows: readonly ResourceRow[]): void {
  const names = new Set(rows.map((row) => row.name))
  for (const resource of model.resources.values()) {
    if (!resource.uncertain) assert.ok(names.has(resource.name), `${state.context}: ${resource.kind} ${resource.name} is gone`)
  }
  for (const row of rows) {
    assert.ok(model.resources.has(row.name), `${state.context}: ${row.kind} ${row.name} came back from the dead`)
  }
  if (model.exactlyOneOf.length === 0) return
  const there = model.exactlyOneOf.filter((name) => names.has(name))
  assert.equal(there.length, 1, `${state.context}: of ${model.exactlyOneOf.join(', ')} these are there: ${there.join(', ')}`)
}

/** Content of every resource, by name. */
export async function readAll(mapper: Mapper, rows: readonly ResourceRow[]): Promise<Map<string, Buffer>> {
  const found = new Map<string, Buffer>()
  for (const row of rows) found.set(row.name, await readResource(mapper, row))
  return found
}

async function readResource(mapper: Mapper, row: ResourceRow): Promise<Buffer> {
  const opened = await mapper.open(row.id, { holder: 'crash-test', readOnly: row.kind !== 'volume' })
  try {
    return Buffer.from(await opened.device.read(0, opened.device.sizeBytes()))
  } finally {
    await mapper.close(row.id)
  }
}

export function checkContent(
  state: Pick<CrashState, 'context' | 'sequence'>,
  model: Model,
  row: ResourceRow,
  found: Map<string, Buffer>,
): void {
  const contents = model.get(row.name).contents
  const content = found.get(row.name) ?? Buffer.alloc(0)
  const failures: string[] = []
  for (const possible of contents) {
    const failure = possible.findImpossible(content, state.sequence)
    if (failure === null) return
    failures.push(failure)
  }
  assert.fail(`${state.context}: ${row.kind} ${row.name}: ${failures.join(' and ')}`)
}

async function checkReclaim(
  state: CrashState,
  { mapper, catalog, engine, store }: Revived,
  rows: readonly ResourceRow[],
  found: Map<string, Buffer>,
): Promise<void> {
  // As the composer does at its start.
  const unfinished = await catalog.db
    .selectFrom('resources')
    .select('id')
    .where('kind', '=', 'file')
    .where('status', '!=', 'available')
    .execute()
  for (const { id } of unfinished) await mapper.deleteResource(id)
  await mapper.reclaim(null)
  // Spares that are being made have a row before they have a file.
  await mapper.idle()
  const leak = await findLeak(catalog, engine, store)
  assert.equal(leak, null, `${state.context}: after reclaim ${leak}`)
  const again = await readAll(mapper, rows)
  for (const [name, content] of found) {
    assert.ok(content.equals(again.get(name) ?? Buffer.alloc(0)), `${state.context}: reclaim changed ${name}`)
  }
}

async function checkLife(
  state: CrashState,
  mapper: Mapper,
  rows: readonly ResourceRow[],
  found: Map<string, Buffer>,
): Promise<void> {
  const volumes = rows.filter((row) => row.kind === 'volume')
  const devices = new Map<string, Device>()
  for (const row of volumes) {
    const { device } = await mapper.open(row.id, { holder: 'crash-test', readOnly: false })
    devices.set(row.id, device)
    const expected = Buffer.from(found.get(row.name) ?? Buffer.alloc(0))
    for (let at = 100; at < expected.length; at += 4096) {
      await device.write(at, Buffer.of(0x55))
      expected[at] = 0x55
    }
    const seen = Buffer.from(await device.read(0, expected.length))
    assert.ok(seen.equals(expected), `${state.context}: a partial write to ${row.name} merged with stale bytes`)
    found.set(row.name, expected)
  }
  if (volumes.length === 0) return
  await mapper.snapshot(volumes.map((row) => ({ volumeId: row.id, name: `${row.name}-second-life` })))
  for (const row of volumes) {
    const expected = found.get(row.name) ?? Buffer.alloc(0)
    const device = devices.get(row.id)
    await device?.write(0, Buffer.of(0x66))
    await device?.flush()
    expected[0] = 0x66
    await mapper.close(row.id)
    const seen = await readResource(mapper, row)
    assert.ok(seen.equals(expected), `${state.context}: ${row.name} lost a flushed write in its second life`)
  }
}
