/**
 * The exporter: keeps in every pool what is needed to bring its content back without the catalog (export-format.ts).
 *
 * Rules:
 * - Every change of an exported row leaves a note in the outbox in the transaction that makes it (migration 0003). A flush reads
 *   the notes since the last one, the rows that they name as they are now, and the pages of the checkpoints among them, and
 *   writes one delta into each pool that they concern; durable on return.
 * - Only what is durable in the catalog is exported: rows are read when no commit without durability is younger than the last
 *   durable one, or inside a durable write of our own. So no export is ever ahead of its catalog, unless the catalog was
 *   replaced by an older copy; then it is left as it is (`ahead`), because it may be the better one.
 * - Nothing is written into a pool before what is in it was read and compared with the outbox as that was before the pool was
 *   opened: a pool may come back long after the catalog was replaced.
 * - Rows are read under one lock of the catalog, pages afterwards under a pin that was taken before: no page that these rows
 *   reach is deleted meanwhile.
 * - What changes its home is in the export of the new one before it leaves that of the old one: a crash between the two leaves it in
 *   both, and an import believes the one with the higher `home_epoch`. A pool whose resources went to one that cannot be written is behind.
 * - A base is written while deltas go on; it is finished by a delta that has everything that changed while it was read. What
 *   it replaces goes only when its last record is there.
 * - A pool whose export cannot be written is *behind*: operations go on, `flushed` says so, and whoever would destroy what the old
 *   export still names waits (see `flushed`). It is tried again; if it misses too much, it gets a new base.
 *
 * Who asks `flushed`, and why: journal segments and the frames of a closing layer go, a layer is punched or removed, and what a
 * shrink left is freed, only when no export needs them any more; a volume is swapped only when its export names its next layer, so that an
 * import never has to look further than an open does; and what an operation promises is in the export when it returns (I9).
 */
import { setImmediate as nextTurn } from 'node:timers/promises'
import {
  AtollError,
  type CatalogTransaction,
  type ExportedRow,
  type ExportedTable,
  exportedTableNames,
  exportedTables,
  isAtollError,
  keyOfRow,
  lastExportSeq,
  lastLayerAlias,
  Mutex,
  pageBatchMax,
  type PoolRowOf,
  presentTables,
  raiseExportSeq,
  readRowsByKey,
  readRowsOfPool,
  type RowKey,
  toAtollError,
} from '@atoll/core'
import { mapBytesMax, type RootRef } from '@atoll/native'
import type { PoolHandle } from '@atoll/southbound'
import type { MapperContext } from './context.ts'
import {
  baseName,
  deltaName,
  encodeRecord,
  type ExportedPage,
  type ExportHeader,
  type ExportRecord,
  parseRecordName,
  recordPrefix,
} from './export-format.ts'
import { loadExport } from './export-load.ts'
import { addLink, type LinkedPool, type PoolLinks, readersOf, readLinks, sourcesOf } from './pool-links.ts'
import { pageOfRoot, rootOf } from './root.ts'

/** How long after a commit that nobody waits for a flush begins. */
export const flushDelayMs = 100
/** How long after a failure it is tried again. */
export const retryDelayMs = 1000
/** A new base is written when the deltas since the last one are longer than it and than this. */
const deltaBytesMin = 4 * 2 ** 20
/** It is also written when they are many: every open reads all of them. A large base is written for more of them. */
const deltaCountMin = 1024
const deltaCountMax = 16 * 1024
const baseBytesPerDelta = 16 * 1024
/** What a part of a base that is there already is taken for. */
const partBytes = 2 ** 20
/** Far above what a newer state of this catalog may have noted; more than any delta has. */
const acceptedAhead = 2 ** 32
/** More notes than these are not read into one delta: a pool that missed as many gets a new base. */
const notesMax = 50_000
/** Notes that every export has are deleted when there are so many. */
const trimNotes = 256
/** Deltas whose names are told ahead, so that a backend with an index of names need not be asked twice while somebody waits. */
const deltasAhead = 16
/** Rows and bytes of pages that one record takes, about. */
const recordRowsMax = 4000
const recordPageBytesMax = 2 * 2 ** 20
/** Pages of a tree fetched at a time. */
const treeBatch = 256
/** Of trees of other pools, remembered for each. */
const treePagesMax = 2 ** 20

export interface ExportStatus {
  /** current: everything that is durable is in it, or is on its way; behind: it cannot be written; ahead: of a newer catalog. */
  readonly state: 'current' | 'behind' | 'ahead'
  /** Milliseconds since 1970; null unless it is behind. */
  readonly behindSince: number | null
  readonly error: AtollError | null
}

interface PoolExport {
  readonly poolId: string
  readonly pool: PoolHandle
  /** A whole base is in the pool. */
  hasBase: boolean
  /** Deltas are written: there is a base, or one is on its way. */
  isTaking: boolean
  /** The export has every change up to this one. */
  exportedSeq: number
  /** Up to where the last record says that it goes: at most `exportedSeq`. */
  recordedSeq: number
  /** Number of the last delta record that is whole; 0: none. */
  lastDelta: number
  nextDelta: number
  /** The pool was told of deltas up to this number. */
  expectedDelta: number
  /**
   * Pages of maps that came from other pools, which deltas since the last base have, each with all that it leads to: another clone
   * of the same image needs none of them again.
   */
  readonly treePages: Set<number>
  baseNumber: number
  baseBytes: number
  deltaBytes: number
  deltaCount: number
  error: AtollError | null
  behindSince: number | null
  isAhead: boolean
  /** What was in the pool has been looked at: nothing is written into its export before. */
  isKnown: boolean
  basing: Promise<void> | null
  isDetached: boolean
}

/** What changed, as of one durable state of the catalog. */
interface Changes {
  readonly toSeq: number
  readonly aliasMax: number
  readonly notes: readonly { readonly table: string; readonly key: string; readonly poolId: string | null }[]
  /** Rows by table and key. */
  readonly rows: ReadonlyMap<string, readonly PoolRowOf[]>
  readonly links: PoolLinks
}

type Context = Pick<
  MapperContext,
  'background' | 'catalog' | 'clock' | 'engine' | 'log' | 'olderCatalog' | 'pageIds' | 'pins' | 'setTimer'
>

/**
 * Before any pool is opened: notes for each where the outbox ended when the pool was opened no more. What its export has beyond
 * that was written by a newer state of this catalog, however much this one has noted for others until the pool is there again.
 */
export async function noteUnopened({ catalog, log }: Pick<MapperContext, 'catalog' | 'log'>): Promise<void> {
  try {
    await catalog.write(
      async (tx) => {
        const value = String(await lastExportSeq(tx))
        for (const { id } of await tx.selectFrom('pools').select('id').execute()) {
          await tx
            .insertInto('meta')
            .values({ key: unopenedKey(id), value })
            .onConflict((conflict) => conflict.column('key').doNothing())
            .execute()
        }
      },
      { durable: false, emergency: true },
    )
  } catch (error) {
    // A full disk, say: the pools are compared with the outbox as it is when each is opened.
    log.warn({ err: error }, 'how far the outbox goes could not be noted for the pools')
  }
}

const unopenedKey = (poolId: string): string => `export_before.${poolId}`

export class Exporter {
  readonly #context: Context
  readonly #pools = new Map<string, PoolExport>()
  /** One flush, or one step of a base that must not come into one, at a time. */
  readonly #turn = new Mutex()
  readonly #stopListening: () => void
  #following: Promise<void> | null = null
  #isRunning = false
  #cancelTimer: (() => void) | null = null
  #cancelRetry: (() => void) | null = null
  /** Whether the last commit was durable, and so every one before it. What a dead process left may not be. */
  #isDurable = false
  #trimmedSeq = 0
  #isClosed = false

  constructor(context: Context) {
    this.#context = context
    this.#stopListening = context.catalog.onCommit(({ durable }) => {
      this.#isDurable = durable
      this.#wake()
    })
  }

  /**
   * Takes up the export of a pool that was just opened, before anything in it is removed. What it lacks is written in the
   * background; nothing here fails for what is in the pool.
   */
  async attach(pool: PoolHandle): Promise<void> {
    const { poolId } = pool
    const state: PoolExport = {
      poolId,
      pool,
      hasBase: false,
      isTaking: false,
      exportedSeq: 0,
      recordedSeq: 0,
      lastDelta: 0,
      nextDelta: 1,
      expectedDelta: 0,
      treePages: new Set(),
      baseNumber: 0,
      baseBytes: 0,
      deltaBytes: 0,
      deltaCount: 0,
      error: null,
      behindSince: null,
      isAhead: false,
      isKnown: false,
      basing: null,
      isDetached: false,
    }
    try {
      await this.#takeUp(state)
    } catch (error) {
      this.#failed(state, error)
    }
    this.#pools.set(poolId, state)
    if (state.isKnown && !state.hasBase && !state.isAhead) this.#startBase(state)
  }

  /** Looks at what is in the pool, before anything is written into it. */
  async #takeUp(state: PoolExport): Promise<void> {
    const { catalog } = this.#context
    const key = unopenedKey(state.poolId)
    const unopened = await catalog.db.selectFrom('meta').select('value').where('key', '=', key).executeTakeFirst()
    const taken = await this.#compare(state, unopened === undefined ? Infinity : Number(unopened.value))
    if (unopened !== undefined) {
      // Older than any note that the pool will be given: a power cut that takes this back takes those back, too.
      await catalog.write(async (tx) => await tx.deleteFrom('meta').where('key', '=', key).execute(), {
        durable: false,
        emergency: true,
      })
    }
    Object.assign(state, taken, { isKnown: true })
  }

  /** What is there is gone on with if nothing is missing between it and the outbox. `before`: the last note that it can have. */
  async #compare(state: PoolExport, before: number): Promise<Partial<PoolExport>> {
    const { catalog, log } = this.#context
    const { poolId } = state
    const found = await loadExport(state.pool.store, { chainOnly: true })
    if (found === null) return {}
    const numbers = { baseNumber: found.baseNumberMax, nextDelta: found.deltaNumberMax + 1 }
    if (found.header.catalogId !== catalog.id) return numbers
    const { known, last, first } = await catalog.read(async (tx) => ({
      known: await tx.selectFrom('export_pools').selectAll().where('pool_id', '=', poolId).executeTakeFirst(),
      last: await lastExportSeq(tx),
      first: await tx.selectFrom('export_changes').select('seq').orderBy('seq').limit(1).executeTakeFirst(),
    }))
    // Also where the older catalog was accepted since: what it must not use stays refused.
    await catalog.read(async (tx) => await this.#context.olderCatalog.recall(tx, poolId))
    if (known?.is_ahead === 1 || found.reachedSeq > Math.min(last, before)) {
      state.isAhead = true
      if (known?.is_ahead !== 1) await this.#noticeOlder(state)
      log.error(
        { poolId, catalogSeq: Math.min(last, before), exportSeq: found.reachedSeq },
        'the export in the pool is newer than this catalog: the catalog is an older copy; the export is left as it is, and nothing of the pool is freed',
      )
      return numbers
    }
    if (found.base === null || found.damages.length > 0) {
      log.warn({ poolId, damages: found.damages }, 'the export in the pool is not whole: it is written anew')
      return numbers
    }
    const isKnown = known !== undefined && known.record_number <= Math.max(found.lastDelta, found.base.deltasFrom - 1)
    // An idle pool gets no records for what concerns others: then the catalog says how far it is complete.
    const exportedSeq = Math.max(found.reachedSeq, isKnown ? known.outbox_seq : 0)
    const isComplete = first === undefined ? exportedSeq >= last : first.seq <= exportedSeq + 1
    if (!isComplete) return numbers
    return {
      ...numbers,
      hasBase: true,
      isTaking: true,
      exportedSeq: Math.min(exportedSeq, last),
      recordedSeq: found.reachedSeq,
      lastDelta: found.lastDelta,
      baseBytes: found.base.partCount * partBytes,
      deltaBytes: found.deltaBytes,
      deltaCount: found.deltaCount,
    }
  }

  /** From here on this catalog knows that it is older, and what of the pool it must not use. */
  async #noticeOlder(state: PoolExport): Promise<void> {
    const { catalog, olderCatalog } = this.#context
    const newer = await loadExport(state.pool.store, { rowsOnly: true })
    await catalog.write(
      async (tx) => {
        if (newer !== null) await olderCatalog.compare(tx, state.poolId, newer)
        await rememberIn(tx, state)
      },
      { emergency: true },
    )
  }

  /** Writes the export of a pool from the beginning; returns when it is whole. @throws AtollError why it cannot be written */
  async renew(poolId: string): Promise<void> {
    const state = this.#pools.get(poolId)
    if (state === undefined || state.isAhead) return
    await state.basing
    this.#startBase(state, { renew: true })
    await state.basing
    if (state.error !== null) throw state.error
  }

  /**
   * This catalog counts from now on, although the export is of a newer state of it: what only that has is given up, and the
   * export is written anew. With the commit that says so the outbox goes on far above whatever the newer state has noted, so
   * that it finds itself the older one if it ever comes back. Returns when the export is whole, or cannot be written.
   * @throws AtollError POOL_NOT_AHEAD
   */
  async accept(poolId: string): Promise<void> {
    const { catalog } = this.#context
    const state = this.#pools.get(poolId)
    if (state?.isAhead !== true) {
      throw new AtollError('POOL_NOT_AHEAD', `the export of pool ${poolId} is not newer than the catalog`, { values: { poolId } })
    }
    const { reachedSeq = 0 } = (await loadExport(state.pool.store, { chainOnly: true })) ?? {}
    await this.#turn.run(async () => {
      await catalog.write(
        async (tx) => {
          await raiseExportSeq(tx, Math.max(reachedSeq, await lastExportSeq(tx)) + acceptedAhead)
          // Every pool gets a new base over that: none can go on from a note before it.
          await tx.deleteFrom('export_changes').execute()
          await rememberIn(tx, { ...state, isAhead: false })
        },
        { emergency: true },
      )
      state.isAhead = false
    })
    this.#startBase(state)
    await this.flush()
    await state.basing
  }

  /** The pool is closed or deleted; with `remove` its export goes with it. */
  async detach(poolId: string, { remove = false }: { remove?: boolean } = {}): Promise<void> {
    const state = this.#pools.get(poolId)
    if (state === undefined) return
    state.isDetached = true
    await state.basing
    // A flush that is running may still write into it.
    await this.#turn.run(() => this.#pools.delete(poolId))
    if (!remove) return
    for (const name of await state.pool.store.listRecords(recordPrefix)) await state.pool.store.removeRecord(name)
  }

  /** Null: the pool is not open. */
  status(poolId: string): ExportStatus | null {
    const state = this.#pools.get(poolId)
    if (state === undefined) return null
    if (state.isAhead) return { state: 'ahead', behindSince: null, error: null }
    return { state: state.error === null ? 'current' : 'behind', behindSince: state.behindSince, error: state.error }
  }

  /**
   * Brings everything that was committed durably before the call into the exports, and says whether those of the pools have
   * it. A pool that is not open has not. Never fails: what went wrong is logged, and `status` has it.
   */
  async flushed(poolIds: Iterable<string>): Promise<boolean> {
    await this.flush()
    let all = true
    for (const poolId of new Set(poolIds)) {
      const state = this.#pools.get(poolId)
      if (state !== undefined && !state.hasBase) await state.basing
      all &&= state !== undefined && state.hasBase && state.error === null
    }
    return all
  }

  /** As `flushed`, also for the pools that read from it, and for `also`; false while one of the readers is not in this catalog. */
  async flushedForPunch(poolId: string, also: Iterable<string> = []): Promise<boolean> {
    const readers = readersOf(await readLinks(this.#context.catalog.db), poolId)
    if (readers.some((pool) => pool.isAbsent)) return false
    return await this.flushed([poolId, ...readers.map((pool) => pool.id), ...also])
  }

  /** A flush that begins after the call; callers that wait for the same one share it. */
  async flush(): Promise<void> {
    if (!this.#isRunning) return await this.#run()
    this.#following ??= this.#turn.run(() => undefined).then(async () => await this.#run())
    await this.#following
  }

  async #run(): Promise<void> {
    this.#isRunning = true
    this.#following = null
    // What was committed until now is in this one.
    this.#cancelTimer?.()
    this.#cancelTimer = null
    try {
      await this.#turn.run(async () => await this.#flushOnce())
    } finally {
      this.#isRunning = false
    }
  }

  /** Waits for what is on its way; the pools are still open. */
  async close(): Promise<void> {
    this.#isClosed = true
    this.#stopListening()
    this.#cancelTimer?.()
    this.#cancelRetry?.()
    for (const state of this.#pools.values()) await state.basing
    await this.flush()
    await this.#turn.run(async () => await this.#trimOutbox(0))
    this.#pools.clear()
  }

  #wake(): void {
    if (this.#isClosed || this.#cancelTimer !== null) return
    this.#cancelTimer = this.#context.setTimer(() => {
      this.#cancelTimer = null
      this.#context.background.start('the export of the pools', async () => await this.flush())
    }, flushDelayMs)
  }

  #retryLater(): void {
    if (this.#isClosed || this.#cancelRetry !== null) return
    this.#cancelRetry = this.#context.setTimer(() => {
      this.#cancelRetry = null
      for (const state of this.#pools.values()) if (!state.hasBase && !state.isAhead) this.#startBase(state)
      this.#wake()
    }, retryDelayMs)
  }

  async #flushOnce(): Promise<void> {
    let states = [...this.#pools.values()].filter((state) => state.isTaking)
    const { catalog, pins } = this.#context
    if (states.length === 0) {
      await this.#trimUnread()
      return
    }
    try {
      const last = await lastExportSeq(catalog.db)
      for (const state of states) if (last - state.exportedSeq > notesMax) this.#giveUp(state)
      states = states.filter((state) => state.isTaking)
      const from = Math.min(...states.map((state) => state.exportedSeq))
      if (states.length === 0 || last === from) {
        for (const state of states) this.#succeeded(state)
        return
      }
      // The pin first: what the rows reach stays until the pages are read.
      await pins.run(async () => {
        const changes = await this.#inDurableState(async (tx) => await readChanges(tx, from))
        const write = async (some: readonly PoolExport[], fn: (state: PoolExport) => Promise<void>): Promise<void> => {
          const results = await Promise.allSettled(some.map(fn))
          results.forEach((result, index) => {
            const state = some[index]
            if (result.status === 'rejected' && state !== undefined) this.#failed(state, result.reason)
          })
        }
        const losing = states.filter((state) => state.exportedSeq < changes.toSeq && gainersOf(state.poolId, changes).size > 0)
        const gained = new Set<string>()
        await write(states, async (state) => {
          if (losing.includes(state)) await this.#writeDelta(state, changes, { keepMoved: true })
          else if (state.exportedSeq < changes.toSeq) await this.#writeDelta(state, changes)
          if (state.hasBase) gained.add(state.poolId)
          if (!losing.includes(state)) this.#succeeded(state)
        })
        await write(losing, async (state) => {
          const missing = [...gainersOf(state.poolId, changes)].find((poolId) => !gained.has(poolId))
          if (missing !== undefined) throw gainerBehind(missing)
          if (!gained.has(state.poolId)) return
          await this.#writeDelta(state, changes)
          this.#succeeded(state)
        })
      })
      await this.#trimOutbox(trimNotes)
    } catch (error) {
      // The catalog: no export has what it should have.
      for (const state of states) this.#failed(state, error)
    }
    for (const state of states) {
      if (isLong(state) && state.hasBase && state.error === null) this.#startBase(state, { renew: true })
    }
  }

  /** It missed so much that its deltas would have no bound: it is written anew. */
  #giveUp(state: PoolExport): void {
    state.hasBase = false
    state.isTaking = false
    this.#startBase(state)
  }

  /** Runs `fn` on a state of the catalog that no power cut takes back. */
  async #inDurableState<T>(fn: (tx: CatalogTransaction) => Promise<T>): Promise<T> {
    const { catalog, clock } = this.#context
    const found = await catalog.read(async (tx) => (this.#isDurable ? { value: await fn(tx) } : null))
    if (found !== null) return found.value
    return await catalog.write(
      async (tx) => {
        // A change of something, or nothing would be synced.
        const value = String(clock.nowMs())
        await tx
          .insertInto('meta')
          .values({ key: 'exported_at', value })
          .onConflict((conflict) => conflict.column('key').doUpdateSet({ value }))
          .execute()
        return await fn(tx)
      },
      { emergency: true },
    )
  }

  /**
   * `keepMoved`: what has gone to other pools is not deleted yet, and the export does not have these changes then; a later delta
   * brings all of them.
   */
  async #writeDelta(state: PoolExport, changes: Changes, { keepMoved = false }: { keepMoved?: boolean } = {}): Promise<void> {
    const { upserts, deletes, pageRanges, trees, isLinked } = deltaOf(state.poolId, changes, keepMoved)
    const toSeq = keepMoved ? state.recordedSeq : changes.toSeq
    const isEmpty = Object.keys(upserts).length + Object.keys(deletes).length + pageRanges.length + trees.length === 0
    if (!isEmpty || isLinked) {
      const first = state.nextDelta
      const put = async (content: Omit<ExportRecord, 'header'>, last: boolean): Promise<void> => {
        // Whatever becomes of the write, its number is used up.
        const number = state.nextDelta
        state.nextDelta += 1
        const { aliasMax, links } = changes
        const header = this.#header(state, { kind: 'delta', number, part: first, last, aliasMax }, links)
        const bytes = encodeRecord({ ...content, header: { ...header, fromSeq: state.recordedSeq, toSeq } })
        await this.#put(state, deltaName(number), bytes)
        state.deltaBytes += bytes.length
        state.deltaCount += 1
        if (last) state.lastDelta = number
        this.#expectDeltas(state)
      }
      const pages = new PageBatches(async (batch) => await put({ upserts: {}, deletes: {}, pages: batch }, false))
      for (const { firstPageId, endPageId } of pageRanges) await this.#addRange(pages, firstPageId, endPageId)
      const added: number[] = []
      for (const root of trees) {
        const page = pageOfRoot(root)
        if (page !== undefined && state.treePages.has(page)) continue
        const ofTree: number[] = []
        if (await this.#addTree(pages, [root], state.poolId, { known: state.treePages, added: ofTree })) added.push(...ofTree)
      }
      await put({ upserts, deletes, pages: pages.rest() }, true)
      state.recordedSeq = toSeq
      if (state.treePages.size + added.length > treePagesMax) state.treePages.clear()
      else for (const id of added) state.treePages.add(id)
    }
    if (!keepMoved) state.exportedSeq = changes.toSeq
  }

  /** Behind the answer; where it fails, each delta does it for itself. */
  #expectDeltas(state: PoolExport): void {
    const { nextDelta } = state
    if (state.isDetached || state.expectedDelta - nextDelta >= deltasAhead / 2) return
    const first = Math.max(nextDelta, state.expectedDelta + 1)
    state.expectedDelta = nextDelta + deltasAhead - 1
    const names = Array.from({ length: state.expectedDelta - first + 1 }, (_, index) => deltaName(first + index))
    this.#context.background.start('naming the next deltas of an export', async () => await state.pool.store.expectRecords(names))
  }

  /** Pages of a checkpoint; those that a later one has replaced since are not there and not needed. */
  async #addRange(pages: PageBatches, firstPageId: number, endPageId: number): Promise<void> {
    for (let start = firstPageId; start < endPageId; start += pageBatchMax) {
      const ids = Array.from({ length: Math.min(pageBatchMax, endPageId - start) }, (_, index) => start + index)
      const bodies = await this.#context.catalog.pages.get(ids)
      for (const [index, body] of bodies.entries()) if (body !== undefined) await pages.add({ id: ids[index] as number, body })
    }
  }

  /**
   * Every page that the roots reach, but those in `known`. A map that cannot be read is left out, and false returned: it could not be
   * opened here either.
   */
  async #addTree(
    pages: PageBatches,
    roots: readonly RootRef[],
    poolId: string,
    { known, added }: { known?: ReadonlySet<number>; added?: number[] } = {},
  ): Promise<boolean> {
    const { catalog, engine, log } = this.#context
    const rest = roots.toReversed()
    let isWhole = true
    while (rest.length > 0) {
      const reach = engine.reach()
      try {
        for (let root = rest.at(-1); root !== undefined; root = rest.at(-1)) {
          reach.addRoot(root, mapBytesMax)
          for (let ids = reach.pending(treeBatch); ids.length > 0; ids = reach.pending(treeBatch)) {
            const bodies = (await catalog.pages.get(ids)).map((body, index) => {
              if (body !== undefined) return body
              throw new AtollError('PAGE_MISSING', `map page ${ids[index]} is not in the catalog`, {
                values: { pageId: ids[index] ?? 0 },
              })
            })
            await reach.supply(ids, bodies)
            for (const [index, body] of bodies.entries()) {
              const id = ids[index] as number
              if (known?.has(id) === true) continue
              await pages.add({ id, body })
              added?.push(id)
            }
            await nextTurn()
          }
          rest.pop()
        }
      } catch (error) {
        if (!isAtollError(error, 'PAGE_MISSING') && !isAtollError(error, 'PAGE_CORRUPT')) throw error
        log.error({ err: error, poolId }, 'a map that cannot be read is left out of the export')
        isWhole = false
        rest.pop()
      }
    }
    return isWhole
  }

  #startBase(state: PoolExport, { renew = false }: { renew?: boolean } = {}): void {
    if (state.basing !== null || this.#isClosed || state.isDetached) return
    state.basing = (async () => {
      try {
        if (!state.isKnown) await this.#takeUp(state)
        if (state.isAhead) return
        if (!state.hasBase || renew) await this.#writeBase(state)
        this.#succeeded(state)
      } catch (error) {
        this.#failed(state, error)
      } finally {
        state.basing = null
      }
    })()
    this.#context.background.start(`the export of pool ${state.poolId}`, async () => {
      await state.basing
    })
  }

  async #writeBase(state: PoolExport): Promise<void> {
    const { catalog, pins } = this.#context
    const number = state.baseNumber + 1
    state.baseNumber = number
    // Between two flushes: which deltas come after this base is certain.
    const { fromSeq, deltasFrom } = await this.#turn.run(async () => {
      if (!state.isTaking) {
        // Numbers of notes that a power cut may take back are given again: none of those counts as exported.
        state.exportedSeq = await this.#inDurableState(lastExportSeq)
        state.recordedSeq = state.exportedSeq
        state.isTaking = true
      }
      // What only deltas before have is not in the base if nobody needs it now.
      state.treePages.clear()
      return { fromSeq: state.exportedSeq, deltasFrom: state.nextDelta }
    })
    let part = 0
    let writtenBytes = 0
    const put = async (content: Omit<ExportRecord, 'header'>, last: boolean): Promise<void> => {
      if (state.isDetached) throw new AtollError('POOL_CLOSED', `pool ${state.poolId} was closed while its export was written`)
      const aliasMax = await lastLayerAlias(catalog.db)
      const header = this.#header(state, { kind: 'base', number, part, last, aliasMax }, await readLinks(catalog.db))
      const toSeq = Math.max(state.recordedSeq, fromSeq)
      const bytes = encodeRecord({ ...content, header: { ...header, fromSeq, toSeq, deltasFrom } })
      await this.#put(state, baseName(number, part), bytes)
      part += 1
      writtenBytes += bytes.length
    }
    const nothing = { upserts: {}, deletes: {}, pages: [] }
    await pins.run(async () => {
      const roots = new Map<bigint, RootRef>()
      for (const table of await presentTables(catalog.db)) {
        let rows: ExportedRow[] = []
        for (let after: RowKey | null = null; ;) {
          const found: ExportedRow[] = await readRowsOfPool(catalog.db, table, state.poolId, after)
          rows.push(...found)
          const end = found.at(-1)
          if (rows.length >= recordRowsMax || (end === undefined && rows.length > 0)) {
            await put({ ...nothing, upserts: { [table]: rows } }, false)
            rows = []
          }
          if (end === undefined) break
          after = keyOfRow(table, end)
          if (table === 'resources') for (const row of found) roots.set(BigInt(String(row['root_word'])), rootOfRow(row))
        }
      }
      const pages = new PageBatches(async (batch) => await put({ ...nothing, pages: batch }, false))
      await this.#addTree(pages, [...roots.values()], state.poolId)
      const rest = pages.rest()
      if (rest.length > 0) await put({ ...nothing, pages: rest }, false)
    })
    // Whatever changed while this was read, and what was read before it was durable, is in a delta from here on.
    const neededSeq = await lastExportSeq(catalog.db)
    await this.flush()
    if (state.exportedSeq < neededSeq) {
      throw (
        state.error ?? new AtollError('POOL_UNAVAILABLE', `the export of pool ${state.poolId} could not be brought up to date`)
      )
    }
    await put(nothing, true)
    state.recordedSeq = Math.max(state.recordedSeq, fromSeq)
    state.hasBase = true
    state.baseBytes = writtenBytes
    state.deltaBytes = 0
    state.deltaCount = 0
    await this.#removeOld(state, number, deltasFrom)
  }

  /** What the base replaces. What cannot be removed now goes with the next one. */
  async #removeOld(state: PoolExport, baseNumber: number, deltasFrom: number): Promise<void> {
    const { store } = state.pool
    try {
      for (const text of await store.listRecords(recordPrefix)) {
        const name = parseRecordName(text)
        if (name !== null && name.number < (name.kind === 'base' ? baseNumber : deltasFrom)) await store.removeRecord(text)
      }
    } catch (error) {
      this.#context.log.warn({ err: error, poolId: state.poolId }, 'old records of the export stay for now')
    }
  }

  #header(
    state: PoolExport,
    part: Pick<ExportHeader, 'kind' | 'number' | 'part' | 'last' | 'aliasMax'>,
    links: PoolLinks,
  ): ExportHeader {
    const { catalog, clock, pageIds } = this.#context
    const named = (pools: readonly LinkedPool[]) => pools.map(({ id, name, driver }) => ({ id, name, driver }))
    const readers = named(readersOf(links, state.poolId))
    const sources = named(sourcesOf(links, state.poolId))
    return {
      ...(readers.length > 0 && { readers }),
      ...(sources.length > 0 && { sources }),
      ...part,
      catalogId: catalog.id,
      poolId: state.poolId,
      formatVersion: catalog.formatVersion,
      writtenAt: clock.nowMs(),
      fromSeq: 0,
      toSeq: 0,
      deltasFrom: 0,
      pageIdMax: pageIds.next,
    }
  }

  /** On a full backend the pool's reserve is there for it: nothing could be freed otherwise. */
  async #put(state: PoolExport, name: string, bytes: Uint8Array): Promise<void> {
    const { store } = state.pool
    try {
      await store.writeRecord(name, bytes)
    } catch (error) {
      if (!isAtollError(error, 'NO_SPACE')) throw error
      await state.pool.releaseReserve()
      await store.writeRecord(name, bytes)
    }
  }

  #succeeded(state: PoolExport): void {
    if (state.error === null || !state.hasBase) return
    state.error = null
    state.behindSince = null
    this.#context.log.info({ poolId: state.poolId }, 'the export of the pool is written again')
  }

  #failed(state: PoolExport, reason: unknown): void {
    if (state.isDetached) return
    const error = toAtollError(reason)
    if (state.error?.code !== error.code) {
      this.#context.log.error(
        { err: error, poolId: state.poolId },
        'the export of the pool cannot be written: nothing of the pool is freed until it can',
      )
    }
    state.error = error
    state.behindSince ??= this.#context.clock.nowMs()
    this.#retryLater()
  }

  /** Notes that every export has are deleted; which record has them is remembered with it. A loss of this commit loses nothing. */
  async #trimOutbox(keepMax: number): Promise<void> {
    const states = [...this.#pools.values()].filter((state) => state.isTaking && state.hasBase)
    if (states.length === 0) return
    const upTo = Math.min(...[...this.#pools.values()].filter((state) => state.isTaking).map((state) => state.exportedSeq))
    if (upTo - this.#trimmedSeq <= keepMax) return
    try {
      await this.#context.catalog.write(
        async (tx) => {
          await tx.deleteFrom('export_changes').where('seq', '<=', upTo).execute()
          for (const state of states) await rememberIn(tx, state)
        },
        { durable: false, emergency: true },
      )
      this.#trimmedSeq = upTo
    } catch (error) {
      this.#context.log.warn({ err: error }, 'the outbox of the exports is not trimmed for now')
    }
  }

  /** No pool takes notes: each gets a new base before it does, so old ones are not needed. */
  async #trimUnread(): Promise<void> {
    const { catalog, log } = this.#context
    try {
      const last = await lastExportSeq(catalog.db)
      if (last - this.#trimmedSeq <= notesMax) return
      await catalog.write(async (tx) => await tx.deleteFrom('export_changes').where('seq', '<=', last).execute(), {
        durable: false,
      })
      this.#trimmedSeq = last
    } catch (error) {
      log.warn({ err: error }, 'the outbox of the exports is not trimmed for now')
    }
  }
}

/** Whether a new base costs less than going on with the deltas. */
export function isLong({
  baseBytes,
  deltaBytes,
  deltaCount,
}: Pick<PoolExport, 'baseBytes' | 'deltaBytes' | 'deltaCount'>): boolean {
  const countMax = Math.min(deltaCountMax, Math.max(deltaCountMin, baseBytes / baseBytesPerDelta))
  return deltaBytes > Math.max(baseBytes, deltaBytesMin) || deltaCount > countMax
}

async function rememberIn(tx: CatalogTransaction, state: PoolExport): Promise<void> {
  const known = { record_number: state.lastDelta, outbox_seq: state.exportedSeq, is_ahead: state.isAhead ? 1 : 0 }
  const pool = await tx.selectFrom('pools').select('id').where('id', '=', state.poolId).executeTakeFirst()
  if (pool === undefined) return
  await tx
    .insertInto('export_pools')
    .values({ pool_id: state.poolId, taken_from: null, ...known })
    .onConflict((conflict) => conflict.column('pool_id').doUpdateSet(known))
    .execute()
}

/** Notes what is not a row: the pages of a checkpoint. Inside the write that commits it. */
export async function notePages(tx: CatalogTransaction, poolId: string, firstPageId: number, endPageId: number): Promise<void> {
  await tx
    .insertInto('export_changes')
    .values({ table_name: 'pages', row_key: `${firstPageId}:${endPageId}`, pool_id: poolId })
    .execute()
}

/** Notes that the pages of a resource's map are in none of the records of `poolId`, its home from now on. Inside a write. */
export async function noteTree(tx: CatalogTransaction, poolId: string, resourceId: string): Promise<void> {
  await tx.insertInto('export_changes').values({ table_name: 'tree', row_key: resourceId, pool_id: poolId }).execute()
}

/**
 * Notes that the map of a resource of `poolId` came from the pool `sourceId`: its pages are in none of its own pool's records, and
 * its layers are there. Inside the write that makes it.
 */
export async function noteForeignTree(
  tx: CatalogTransaction,
  poolId: string,
  resourceId: string,
  sourceId: string,
): Promise<void> {
  await noteTree(tx, poolId, resourceId)
  await addLink(tx, poolId, sourceId)
}

async function readChanges(tx: CatalogTransaction, from: number): Promise<Changes> {
  const found = await tx.selectFrom('export_changes').selectAll().where('seq', '>', from).orderBy('seq').execute()
  const notes = found.map((row) => ({ table: row.table_name, key: row.row_key, poolId: row.pool_id }))
  const keys = new Map<ExportedTable, Set<string>>()
  for (const { table, key } of notes) {
    // The map of a tree is that of its resource.
    const of = (table === 'tree' ? 'resources' : table) as ExportedTable
    if (!(of in exportedTables)) continue
    const known = keys.get(of)
    if (known === undefined) keys.set(of, new Set([key]))
    else known.add(key)
  }
  const rows = new Map<string, PoolRowOf[]>()
  for (const [table, wanted] of keys) {
    const isNumber = table === 'layers' || table === 'replicas'
    for (const each of await readRowsByKey(tx, table, isNumber ? [...wanted].map(Number) : [...wanted])) {
      const place = `${table} ${keyOfRow(table, each.row)}`
      const known = rows.get(place)
      if (known === undefined) rows.set(place, [each])
      else known.push(each)
    }
  }
  return { toSeq: await lastExportSeq(tx), aliasMax: await lastLayerAlias(tx), notes, rows, links: await readLinks(tx) }
}

interface Delta {
  readonly upserts: Partial<Record<ExportedTable, ExportedRow[]>>
  readonly deletes: Partial<Record<ExportedTable, RowKey[]>>
  readonly pageRanges: { readonly firstPageId: number; readonly endPageId: number }[]
  readonly trees: RootRef[]
  /** What the header says of other pools has changed. */
  isLinked: boolean
}

/** Tables of which a row goes with its resource to another pool. */
const movedTables: ReadonlySet<string> = new Set(['resources', 'volumes', 'files'])

/** The pools to which resources of this one have gone: their exports have these before the pool's own loses them. */
function gainersOf(poolId: string, { notes, rows }: Changes): Set<string> {
  const gainers = new Set<string>()
  for (const note of notes) {
    if (note.poolId !== poolId || !movedTables.has(note.table)) continue
    for (const { poolId: other } of rows.get(`${note.table} ${note.key}`) ?? [])
      if (other !== null && other !== poolId) gainers.add(other)
  }
  return gainers
}

function gainerBehind(poolId: string): AtollError {
  const message = `resources have gone to pool ${poolId}, whose export does not have them yet`
  return new AtollError('POOL_UNAVAILABLE', message, { values: { poolId }, retryable: true })
}

/** What of the changes concerns one pool. `keepMoved`: but the deletes of what is in another one now. */
function deltaOf(poolId: string, { notes, rows }: Changes, keepMoved: boolean): Delta {
  const delta: Delta = { upserts: {}, deletes: {}, pageRanges: [], trees: [], isLinked: false }
  const seen = new Set<string>()
  for (const note of notes) {
    if (note.poolId !== null && note.poolId !== poolId) continue
    const place = `${note.table} ${note.key}`
    if (seen.has(place)) continue
    seen.add(place)
    if (note.table === 'pages') {
      const [firstPageId = 0, endPageId = 0] = note.key.split(':').map(Number)
      delta.pageRanges.push({ firstPageId, endPageId })
      continue
    }
    if (note.table === 'link') {
      delta.isLinked = true
      continue
    }
    if (note.table === 'tree') {
      const found = rows.get(`resources ${note.key}`)?.find((each) => each.poolId === poolId)
      if (found !== undefined) delta.trees.push(rootOfRow(found.row))
      continue
    }
    if (!(exportedTableNames as readonly string[]).includes(note.table)) continue
    const table = note.table as ExportedTable
    const present = rows.get(place)?.find((each) => each.poolId === null || each.poolId === poolId)
    if (present !== undefined) (delta.upserts[table] ??= []).push(present.row)
    else if (keepMoved && movedTables.has(table) && rows.has(place)) continue
    else (delta.deletes[table] ??= []).push(table === 'layers' || table === 'replicas' ? Number(note.key) : note.key)
  }
  return delta
}

function rootOfRow(row: ExportedRow): RootRef {
  return rootOf({ root_word: BigInt(String(row['root_word'])), root_crc: Number(row['root_crc']) })
}

/** Pages on their way into records of a bounded size. */
class PageBatches {
  readonly #write: (batch: ExportedPage[]) => Promise<void>
  #batch: ExportedPage[] = []
  #bytes = 0

  constructor(write: (batch: ExportedPage[]) => Promise<void>) {
    this.#write = write
  }

  async add(page: ExportedPage): Promise<void> {
    this.#batch.push(page)
    this.#bytes += page.body.length
    if (this.#bytes < recordPageBytesMax) return
    await this.#write(this.rest())
  }

  /** What was not written yet; the caller writes it. */
  rest(): ExportedPage[] {
    const rest = this.#batch
    this.#batch = []
    this.#bytes = 0
    return rest
  }
}
