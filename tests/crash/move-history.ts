/**
 * As history.ts, over two pools between which a volume is moved, step by step, there and back, finished or given up: after each
 * operation every state that a power cut at any sync boundary of either store, or at any commit, could have left is opened, compared with what
 * is possible, and gone on with. The stores and the catalog form one ordered history, by ticks.
 */
import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { adminProject, openCatalog, silentLog, type Catalog, type JsonObject } from '@atoll/core'
import { openMapper, type Mapper, type MoveRequest } from '@atoll/mapper'
import { type Device, Engine, type Store } from '@atoll/native'
import { checkContent, checkExistence, readAll } from './crash-state.ts'
import { givenStoresDriver } from './given-store-driver.ts'
import type { HistoryReport } from './history.ts'
import { Model, type ModelResource } from './model.ts'
import { PossibleContent } from './possible-content.ts'
import { Random } from './random.ts'
import { recordCommits, type RecordedCommit, type RecordingCatalog } from './recording-catalog.ts'

export interface MoveHistoryOptions {
  readonly seed: number
  readonly operationCount: number
  /** Random subsets for each boundary. */
  readonly drawsPerBoundary: number
}

const slotBytes = 4096
const volumeSlots = 16
const snapshotsMax = 3
const clonesMax = 2
/** One in so many states goes on with the move, and one in so many gives it up. */
const goOnEvery = 3
const giveUpEvery = 5
const freezeDeadlineMs = 60_000

type Step = 'freeze' | 'claim' | 'fill' | 'home' | 'drop'

/** What stands in the job's row. */
interface Saved extends JsonObject {
  step: Step
  cursor: JsonObject | null
}

const nextStep = { freeze: 'claim', claim: 'fill', fill: 'home', home: 'drop', drop: 'drop' } as const

export async function runMoveHistory(options: MoveHistoryOptions): Promise<HistoryReport> {
  const engine = new Engine()
  const stores = [0, 1].map(() => engine.memoryStore({ capacityBytes: 1 << 30, record: true }))
  const inner = await openCatalog(':memory:')
  const [clock] = stores
  assert.ok(clock !== undefined)
  const recording = recordCommits(inner, { sequence: () => clock.tick() })
  const mapper = await openTestMapper(recording.catalog, engine, stores)
  try {
    const history = new MoveHistory(options, stores, recording, mapper)
    await history.run()
    return history.report
  } finally {
    await mapper.close()
    await inner.close()
    await engine.close()
  }
}

async function openTestMapper(catalog: Catalog, engine: Engine, stores: readonly Store[]): Promise<Mapper> {
  return await openMapper({ catalog, engine, drivers: [givenStoresDriver(stores)], log: silentLog(), setTimer: () => () => {} })
}

/** One step of a move, from what was saved last; what is to be saved next, null at the end. */
async function takeStep(mapper: Mapper, request: MoveRequest, { step, cursor }: Saved): Promise<Saved | null> {
  const { moves } = mapper
  if (step === 'freeze') await moves.freeze(request, { deadlineMs: freezeDeadlineMs })
  if (step === 'claim') assert.ok((await moves.claim(request)).claimed)
  if (step === 'fill') {
    // One slot at a time, so that there are pieces.
    const piece = await moves.fillNext(request, cursor, { limitBytesPerSecond: null, pieceBytes: slotBytes })
    if (!piece.isDone) return { step, cursor: piece.cursor }
  }
  if (step === 'home') await moves.home(request)
  if (step === 'drop') {
    await moves.drop(request, {})
    return null
  }
  return { step: nextStep[step], cursor: null }
}

class MoveHistory {
  readonly report: HistoryReport = { operations: 0, boundaries: 0, states: 0, byOperation: {} }
  readonly #options: MoveHistoryOptions
  readonly #random: Random
  readonly #stores: readonly Store[]
  readonly #recording: RecordingCatalog
  readonly #mapper: Mapper
  readonly #model = new Model()
  readonly #ids = new Map<string, string>()
  readonly #devices = new Map<string, Device>()
  readonly #poolIds: string[] = []
  #nextName = 1
  #stamp = 1
  #move: { readonly request: MoveRequest; saved: Saved } | null = null
  #commits: RecordedCommit[] = []
  #checkedTick = 0

  constructor(options: MoveHistoryOptions, stores: readonly Store[], recording: RecordingCatalog, mapper: Mapper) {
    this.#options = options
    this.#random = new Random(options.seed)
    this.#stores = stores
    this.#recording = recording
    this.#mapper = mapper
  }

  async run(): Promise<void> {
    for (const place of ['0', '1']) {
      const wanted = { projectId: adminProject.id, name: `pool-${place}`, driver: 'memory', options: { place } }
      this.#poolIds.push((await this.#mapper.pools.create(wanted)).id)
    }
    await this.#mapper.idle()
    this.#commits = [await this.#recording.first()]
    this.#recording.take()
    this.#checkedTick = this.#tick()
    await this.#create('volume', null)
    for (let index = 0; index < this.#options.operationCount; index += 1) {
      const operation = this.#pickOperation()
      this.report.byOperation[operation] = (this.report.byOperation[operation] ?? 0) + 1
      await this.#perform(operation)
      this.report.operations += 1
    }
  }

  #tick(): number {
    return this.#stores[0]?.tick() ?? 0
  }

  #pickOperation(): string {
    const clones = this.#model.of('volume').length - 1
    const snapshots = this.#model.of('snapshot').length
    const roll = this.#random.below(100)
    if (roll < 34) return 'write'
    if (roll < 38) return 'zero'
    if (roll < 50) return 'flush'
    if (roll < 55) return snapshots < snapshotsMax ? 'snapshot' : 'delete-snapshot'
    if (roll < 58) return snapshots > 0 ? 'delete-snapshot' : 'snapshot'
    if (roll < 62) return clones < clonesMax ? 'clone' : 'delete-clone'
    if (roll < 64) return clones > 0 ? 'delete-clone' : 'clone'
    if (roll < 68) return 'reopen'
    if (roll < 71) return 'reclaim'
    return this.#move !== null && this.#random.below(30) === 0 ? 'give-up' : 'move'
  }

  async #perform(operation: string): Promise<void> {
    switch (operation) {
      case 'write':
      case 'zero':
        return await this.#mutate(operation)
      case 'flush':
        return await this.#flush()
      case 'snapshot':
        return await this.#snapshot()
      case 'clone':
        return await this.#create('clone', this.#random.pick([...this.#model.of('volume'), ...this.#model.of('snapshot')]))
      case 'delete-snapshot':
        return await this.#delete(this.#random.pick(this.#model.of('snapshot')))
      case 'delete-clone':
        return await this.#delete(this.#random.pick(this.#model.of('volume').slice(1)))
      case 'reopen':
        return await this.#reopen()
      case 'reclaim':
        await this.#mapper.reclaim(null)
        return await this.#examine('reclaim')
      case 'give-up':
        return await this.#giveUp()
      case 'move':
        return await this.#moveOn()
      default:
        throw new Error(`no operation ${operation}`)
    }
  }

  #id(name: string): string {
    const id = this.#ids.get(name)
    assert.ok(id !== undefined, `no id of ${name}`)
    return id
  }

  async #device(name: string): Promise<Device> {
    const known = this.#devices.get(name)
    if (known !== undefined) return known
    const { device } = await this.#mapper.open(this.#id(name), { holder: 'history', readOnly: false })
    this.#devices.set(name, device)
    return device
  }

  async #close(name: string): Promise<void> {
    if (!this.#devices.delete(name)) return
    await this.#mapper.close(this.#id(name))
    await this.#examine(`close ${name}`)
    this.#model.content(name).flushed()
  }

  #data(at: number, length: number): Buffer {
    const data = Buffer.alloc(length)
    const stamp = this.#stamp++
    const word = Buffer.alloc(4)
    word.writeUInt32LE(stamp)
    for (let index = 0; index < length; index += 1) data[index] = word[(at + index) % 4] ?? 0
    return data
  }

  async #mutate(kind: 'write' | 'zero'): Promise<void> {
    const { name } = this.#random.pick(this.#model.of('volume'))
    const device = await this.#device(name)
    const content = this.#model.content(name)
    const at = this.#random.below(volumeSlots) * slotBytes
    const data = kind === 'write' ? this.#data(at, slotBytes) : Buffer.alloc(slotBytes)
    content.write(at, data)
    if (kind === 'write') await device.write(at, data)
    else await device.writeZeroes(at, slotBytes)
    await this.#examine(`${kind} ${name}`)
  }

  async #flush(): Promise<void> {
    const { name } = this.#random.pick(this.#model.of('volume'))
    await (await this.#device(name)).flush()
    await this.#examine(`flush ${name}`)
    this.#model.content(name).flushed()
  }

  #add(name: string, kind: 'volume' | 'snapshot', content: PossibleContent, volumeName: string | null): ModelResource {
    return this.#model.add({ name, kind, contents: [content], uncertain: true, open: false, volumeName })
  }

  async #create(prefix: string, source: ModelResource | null): Promise<void> {
    const name = `${prefix}-${this.#nextName++}`
    const bytes = source === null ? Buffer.alloc(volumeSlots * slotBytes) : this.#model.content(source.name).current
    const made = this.#add(name, 'volume', new PossibleContent(bytes), null)
    const wanted = {
      projectId: adminProject.id,
      name,
      sizeBytes: volumeSlots * slotBytes,
      poolId: source === null ? (this.#poolIds[0] ?? '') : this.#random.pick(this.#poolIds),
    }
    const row = await this.#mapper.createVolume(source === null ? wanted : { ...wanted, fromId: this.#id(source.name) })
    this.#ids.set(name, row.id)
    await this.#examine(`create ${name} from ${source?.name ?? 'nothing'}`)
    made.uncertain = false
    if (source?.kind === 'volume') this.#model.content(source.name).flushed()
  }

  async #snapshot(): Promise<void> {
    const volume = this.#model.of('volume')[0]
    assert.ok(volume !== undefined)
    const name = `snapshot-${this.#nextName++}`
    const made = this.#add(name, 'snapshot', new PossibleContent(this.#model.content(volume.name).current), volume.name)
    const { rows } = await this.#mapper.snapshot([{ volumeId: this.#id(volume.name), name }])
    this.#ids.set(name, rows[0]?.id ?? '')
    await this.#examine(`snapshot ${name}`)
    made.uncertain = false
    this.#model.content(volume.name).flushed()
  }

  async #delete(resource: ModelResource): Promise<void> {
    await this.#close(resource.name)
    resource.uncertain = true
    await this.#mapper.deleteResource(this.#id(resource.name))
    await this.#examine(`delete ${resource.name}`)
    this.#model.resources.delete(resource.name)
  }

  async #reopen(): Promise<void> {
    const { name } = this.#random.pick(this.#model.of('volume'))
    if (this.#devices.has(name)) return await this.#close(name)
    await this.#device(name)
    return await this.#examine(`open ${name}`)
  }

  /** Writes with flushes while a step is taken. */
  async #writeMeanwhile(): Promise<void> {
    for (const { name } of this.#model.of('volume')) {
      const device = this.#devices.get(name)
      if (device === undefined) continue
      const content = this.#model.content(name)
      for (let count = 0; count < 3; count += 1) {
        const at = this.#random.below(volumeSlots) * slotBytes
        const data = this.#data(at, slotBytes)
        content.write(at, data)
        await device.write(at, data)
        await device.flush()
        content.markFlushed(this.#tick())
      }
    }
  }

  async #moveOn(): Promise<void> {
    if (this.#move === null) return await this.#beginMove()
    const { request, saved } = this.#move
    const [next] = await Promise.all([takeStep(this.#mapper, request, saved), this.#writeMeanwhile()])
    await this.#examine(`${saved.step} of a move`)
    if (next === null) await this.#endMove('done')
    else {
      this.#move.saved = next
      await this.#save(request.jobId, { cursor: next })
    }
    await this.#examine(`${saved.step} of a move is over`)
  }

  async #beginMove(): Promise<void> {
    const volume = this.#model.of('volume')[0]
    assert.ok(volume !== undefined)
    const volumeId = this.#id(volume.name)
    const withSnapshots = this.#random.below(4) > 0
    const home = this.#mapper.opened(volumeId)?.poolId ?? this.#poolIds[0]
    const targetPoolId = this.#random.below(5) === 0 ? (home ?? '') : (this.#poolIds.find((id) => id !== home) ?? '')
    const request = { jobId: randomUUID(), volumeId, targetPoolId, withSnapshots }
    await this.#recording.catalog.write(async (tx) => {
      await tx
        .insertInto('jobs')
        .values({
          id: request.jobId,
          project_id: adminProject.id,
          kind: 'migrate',
          subject: volumeId,
          state: 'running',
          progress_bytes: 0,
          total_bytes: null,
          params: { targetPoolId, withSnapshots },
          cursor: null,
          result: null,
          error_code: null,
          error_message: null,
          created_at: 1,
          updated_at: 1,
        })
        .execute()
    })
    this.#move = { request, saved: { step: 'freeze', cursor: null } }
    return await this.#examine('a move begins')
  }

  async #save(jobId: string, changes: { cursor: Saved } | { state: 'done' | 'cancelled' }): Promise<void> {
    await this.#recording.catalog.write(async (tx) => {
      await tx.updateTable('jobs').set(changes).where('id', '=', jobId).execute()
    })
  }

  async #endMove(state: 'done' | 'cancelled'): Promise<void> {
    if (this.#move !== null) await this.#save(this.#move.request.jobId, { state })
    this.#move = null
  }

  async #giveUp(): Promise<void> {
    if (this.#move === null) return
    await this.#mapper.moves.release(this.#move.request)
    await this.#examine('a move is given up')
    await this.#endMove('cancelled')
    return await this.#examine('a move was given up')
  }

  /** Looks at every state since the last call. */
  async #examine(what: string): Promise<void> {
    this.#commits.push(...this.#recording.take())
    const end = this.#tick()
    const moments: { tick: number; commitCount: number }[] = []
    for (const boundary of this.#stores.flatMap((store) => [...store.boundaryTicks(this.#checkedTick)])) {
      const before = this.#commits.filter((commit) => commit.storeSequence < boundary).length
      moments.push({ tick: boundary, commitCount: Math.max(before, 1) })
    }
    this.#commits.forEach((commit, index) => {
      if (commit.storeSequence >= this.#checkedTick) moments.push({ tick: commit.storeSequence, commitCount: index + 1 })
    })
    // In their order: what a store was asked for last is what it finds quickest.
    for (const moment of moments.toSorted((a, b) => a.tick - b.tick)) await this.#examineMoment(what, moment)
    this.#checkedTick = end
    for (const store of this.#stores) store.forgetBefore(store.sequenceAt(end))
    const lastDurable = this.#commits.findLastIndex((commit) => commit.durable)
    this.#commits = this.#commits.slice(Math.max(lastDurable, 0))
  }

  async #examineMoment(what: string, { tick, commitCount }: { tick: number; commitCount: number }): Promise<void> {
    const number = this.report.boundaries++
    const commits = this.#commits.slice(0, commitCount)
    const candidates = commits.slice(
      Math.max(
        commits.findLastIndex((commit) => commit.durable),
        0,
      ),
    )
    for (let draw = 0; draw < this.#options.drawsPerBoundary; draw += 1) {
      const seed = this.#options.seed * 1_000_003 + number * 1009 + draw
      const random = new Random(seed)
      const commit = draw === 0 ? candidates.at(-1) : random.pick(candidates)
      assert.ok(commit !== undefined)
      // The first draws are the extremes: everything survived, nothing did.
      const keepOf256 = draw === 0 ? 255 : draw === 1 ? 0 : random.pick([32, 96, 128, 160, 224])
      const stateNumber = this.report.states++
      const how = { keepOf256, tear: draw > 1, reorder: draw > 1 }
      const images = this.#stores.map((store, index) => store.crashImage(store.sequenceAt(tick), seed + index, how))
      const context = `seed ${this.#options.seed}, operation ${this.report.operations} (${what}), tick ${tick}, draw ${draw}`
      await this.#check({ context, sequence: tick }, commit.bytes, images, stateNumber)
    }
  }

  /** Brings a state back to life: it has what it may have, also when the move goes on or is given up. */
  async #check(
    state: { context: string; sequence: number },
    catalogBytes: Uint8Array,
    images: readonly Store[],
    stateNumber: number,
  ): Promise<void> {
    const engine = new Engine()
    const catalog = await openCatalog(catalogBytes)
    try {
      const mapper = await openTestMapper(catalog, engine, images)
      try {
        // After a change of home the export of the old one waits for that of the new one: nobody's timer is there to try again.
        const poolIds = (await mapper.pools.list()).map((pool) => pool.id)
        for (let tries = 0; tries < 3 && !(await mapper.flushExports(poolIds)); tries += 1);
        const { findings } = await mapper.check()
        const bad = findings.filter(({ severity }) => severity !== 'note')
        assert.deepEqual(bad, [], state.context)
        const rows = await catalog.db.selectFrom('resources').selectAll().where('status', '=', 'available').execute()
        checkExistence(state, this.#model, rows)
        const found = await readAll(mapper, rows)
        for (const row of rows) checkContent(state, this.#model, row, found)
        const isSame = async (what: string): Promise<void> => {
          const again = await readAll(mapper, rows)
          for (const [name, content] of found)
            assert.ok(content.equals(again.get(name) ?? Buffer.alloc(0)), `${state.context}: ${what} changed ${name}`)
        }
        if (stateNumber % goOnEvery === 0 && (await goOn(catalog, mapper))) await isSame('going on with the move')
        else if (stateNumber % giveUpEvery === 0 && (await giveUp(catalog, mapper))) await isSame('giving the move up')
        else return
        await mapper.reclaim(null)
        await isSame('a reclaim after that')
      } finally {
        await mapper.close()
      }
    } catch (error) {
      if (error instanceof assert.AssertionError) throw error
      throw new assert.AssertionError({ message: `${state.context}: ${String((error as Error).stack)}` })
    } finally {
      await catalog.close()
      await engine.close()
    }
  }
}

async function unfinishedMove(catalog: Catalog): Promise<{ request: MoveRequest; saved: Saved } | null> {
  const row = await catalog.db.selectFrom('jobs').selectAll().where('state', '=', 'running').executeTakeFirst()
  if (row === undefined) return null
  const { targetPoolId, withSnapshots } = row.params as { targetPoolId: string; withSnapshots: boolean }
  const request = { jobId: row.id, volumeId: row.subject, targetPoolId, withSnapshots }
  return { request, saved: (row.cursor as Saved | null) ?? { step: 'freeze', cursor: null } }
}

/** As the composer does: from what the job's row says, to the end. */
async function goOn(catalog: Catalog, mapper: Mapper): Promise<boolean> {
  const move = await unfinishedMove(catalog)
  if (move === null) return false
  // What was claimed is asked for again by whoever fills.
  if (move.saved.step === 'fill') await takeStep(mapper, move.request, { step: 'claim', cursor: null })
  for (let saved: Saved | null = move.saved; saved !== null;) saved = await takeStep(mapper, move.request, saved)
  await catalog.write(async (tx) => {
    await tx.updateTable('jobs').set({ state: 'done' }).where('id', '=', move.request.jobId).execute()
  })
  const home = await catalog.db
    .selectFrom('resources')
    .select('home_pool_id')
    .where('id', '=', move.request.volumeId)
    .executeTakeFirst()
  assert.equal(home?.home_pool_id, move.request.targetPoolId)
  return true
}

async function giveUp(catalog: Catalog, mapper: Mapper): Promise<boolean> {
  const move = await unfinishedMove(catalog)
  if (move === null) return false
  await mapper.moves.release(move.request)
  await catalog.write(async (tx) => {
    await tx.updateTable('jobs').set({ state: 'cancelled' }).where('id', '=', move.request.jobId).execute()
  })
  return true
}
