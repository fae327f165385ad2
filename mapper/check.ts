/**
 * Looks over everything that the catalog and the pools say of each other, while all of it is in use.
 *
 * Rules:
 * - Nothing is changed, and nobody waits for a check but for moments. What is found is told with what to do about it; a check
 *   that finds a part unreadable goes on with the others.
 * - A repair does only what cannot lose anything: it deletes what nothing refers to, makes again what can be made again, and
 *   keeps what would have been removed wrongly. It looks again before it changes something, and what needs a decision is left.
 * - Each subject is a file, and one line below. What changes meanwhile is dealt with by order: the files are listed, then the
 *   pages are pinned, then the rows are read, all in one transaction; and what looks missing is looked for again.
 */
import { setImmediate as nextTurn } from 'node:timers/promises'
import { AtollError, Mutex, toAtollError, type CatalogTransaction, type ReplicaRow } from '@atoll/core'
import type { LayerListing } from '@atoll/southbound'
import { checkCatalog } from './check-catalog.ts'
import type { CheckContext, CheckFinding, CheckState, Found } from './check-finding.ts'
import { checkExports } from './check-exports.ts'
import { checkJournals } from './check-journals.ts'
import { checkLayers } from './check-layers.ts'
import { checkMaps } from './check-maps.ts'
import { checkPools } from './check-pools.ts'
import { checkReferences } from './check-references.ts'
import { checkReplicas } from './check-replicas.ts'
import type { MapperContext } from './context.ts'
import { eachInTurns, inPieces, mapInTurns } from './turns.ts'
import type { Reclaimer } from './reclaim.ts'

export const checkSubjects = ['pools', 'catalog', 'references', 'maps', 'layers', 'journals', 'exports'] as const
export type CheckSubject = (typeof checkSubjects)[number]

export interface CheckOptions {
  /** Default false. True: puts right what can be without losing anything. */
  readonly repair?: boolean
  /** Default false. True: looks also for space that nothing refers to, in every layer. */
  readonly deep?: boolean
  /** Default: all. What is looked at; maps and layers go together. */
  readonly subjects?: readonly CheckSubject[]
  readonly signal?: AbortSignal
  /** Pages looked at so far, and how many there were when the check began. */
  readonly onProgress?: (donePages: number, totalPages: number) => void
}

export interface CheckReport {
  /** Worst first; at most `checkFindingsMax`. */
  readonly findings: readonly CheckFinding[]
  /** Of all that were found, also those beyond the bound, by what is left after a repair. */
  readonly errors: number
  readonly warnings: number
  readonly notes: number
  readonly repaired: number
}

/** Page ids counted in one turn of the event loop. */
const pagesAtOnce = 4096

/** Findings that one check tells; more are counted only. */
export const checkFindingsMax = 1000

const severities = ['error', 'warning', 'note'] as const

export class Checker {
  readonly #context: MapperContext
  readonly #reclaimer: Reclaimer
  readonly #oneAtATime = new Mutex()

  constructor(context: MapperContext, reclaimer: Reclaimer) {
    this.#context = context
    this.#reclaimer = reclaimer
  }

  /**
   * Looks over everything. One check runs at a time.
   * @throws AtollError JOB_CANCELLED; the errors of the catalog, if not even its rows can be read
   */
  async run(options: CheckOptions = {}): Promise<CheckReport> {
    return await this.#oneAtATime.run(async () => await this.#run(options))
  }

  async #run(options: CheckOptions): Promise<CheckReport> {
    const found: Found[] = []
    const counts = { error: 0, warning: 0, note: 0 }
    const add = (finding: Found): void => {
      counts[finding.severity] += 1
      if (found.length < checkFindingsMax) found.push(finding)
    }
    await this.#look(options, add)
    const repairs = options.repair === true ? await this.#repair(found, options) : new Map<Found, string>()
    for (const finding of repairs.keys()) counts[finding.severity] -= 1
    const findings = found.map((finding): CheckFinding => {
      const { severity, kind, object, message, mend } = finding
      return { severity, kind, object, message, repairable: mend !== undefined, repair: repairs.get(finding) ?? null }
    })
    findings.sort((a, b) => severities.indexOf(a.severity) - severities.indexOf(b.severity))
    return { findings, errors: counts.error, warnings: counts.warning, notes: counts.note, repaired: repairs.size }
  }

  async #look(options: CheckOptions, add: (finding: Found) => void): Promise<void> {
    const context = this.#context
    const listings = await this.#listLayers(add)
    await context.pins.run(async () => {
      const boundary = context.pageIds.boundary()
      const state = await readState(context, listings)
      const pageCount = await countPages(context, boundary)
      let donePages = 0
      const step = (done = 0): void => {
        throwIfCancelled(options.signal)
        donePages += done
        options.onProgress?.(Math.min(donePages, pageCount), pageCount)
      }
      const check: CheckContext = { mapper: context, reclaimer: this.#reclaimer, state, deep: options.deep === true, add, step }
      const subjects = new Set(options.subjects ?? checkSubjects)
      const look = async (subject: CheckSubject, fn: () => Promise<void>): Promise<void> => {
        if (subjects.has(subject)) await part(check, fn)
      }
      await look('pools', async () => await checkPools(check))
      await look('catalog', async () => await checkCatalog(check))
      await look('references', async () => await checkReferences(check))
      await part(check, async () => {
        if (!subjects.has('maps') && !subjects.has('layers')) return
        const maps = await checkMaps(subjects.has('maps') ? check : { ...check, add: () => undefined }, boundary)
        if (subjects.has('layers')) {
          await checkLayers(check, maps)
          await checkReplicas(check, maps)
        }
        maps.walk.clear()
      })
      await look('journals', async () => await checkJournals(check))
      await look('exports', async () => await checkExports(check))
    })
  }

  async #listLayers(add: (finding: Found) => void): Promise<Map<string, Map<string, LayerListing>>> {
    const listings = new Map<string, Map<string, LayerListing>>()
    for (const poolId of this.#context.pools.openIds()) {
      try {
        const listing = await this.#context.pools.handle(poolId).listLayers()
        listings.set(poolId, await mapInTurns(listing, (layer) => layer.id))
      } catch (error) {
        const { code, message } = toAtollError(error)
        add({
          severity: 'error',
          kind: 'backend-failed',
          object: poolId,
          message: `its layers cannot be listed: ${code}: ${message}`,
        })
      }
    }
    return listings
  }

  async #repair(found: readonly Found[], options: CheckOptions): Promise<Map<Found, string>> {
    const repairs = new Map<Found, string>()
    for (const finding of found) {
      throwIfCancelled(options.signal)
      if (finding.mend === undefined) continue
      try {
        const done = await finding.mend()
        if (done === null) continue
        repairs.set(finding, done)
        this.#context.log.warn({ kind: finding.kind, object: finding.object, repair: done }, 'a check has repaired something')
      } catch (error) {
        this.#context.log.warn({ err: error, kind: finding.kind, object: finding.object }, 'a repair failed')
      }
    }
    return repairs
  }
}

/** What cannot even be read is a finding, too, and the other parts are looked at all the same. */
async function part({ add }: CheckContext, fn: () => Promise<void>): Promise<void> {
  try {
    await fn()
  } catch (error) {
    const { code, message } = toAtollError(error)
    if (code === 'JOB_CANCELLED' || code === 'INTERNAL') throw error
    const kind = code.startsWith('CATALOG_') ? 'catalog-damaged' : 'backend-failed'
    add({ severity: 'error', kind, object: code, message: `a part could not be looked at: ${message}` })
  }
}

function throwIfCancelled(signal: AbortSignal | undefined): void {
  if (signal?.aborted !== true) return
  throw new AtollError('JOB_CANCELLED', 'the check was cancelled', { cause: signal.reason })
}

async function countPages({ catalog }: MapperContext, boundary: number): Promise<number> {
  let count = 0
  for (let from = 1; ;) {
    const ids = await catalog.pages.listIds(from, boundary, pagesAtOnce)
    count += ids.length
    if (ids.length < pagesAtOnce) return count
    from = (ids.at(-1) ?? from) + 1
    await nextTurn()
  }
}

async function readState(
  { catalog }: MapperContext,
  listings: ReadonlyMap<string, ReadonlyMap<string, LayerListing>>,
): Promise<CheckState> {
  // One state of all tables. Read in pieces: a catalog of a hundred thousand files must not hold the event loop meanwhile.
  const rows = await catalog.read(async (tx) => ({
    resources: await inPieces(
      async (after, limit) =>
        await tx.selectFrom('resources').selectAll().where('id', '>', after).orderBy('id').limit(limit).execute(),
      (row) => row.id,
      '',
    ),
    volumes: await inPieces(
      async (after, limit) =>
        await tx.selectFrom('volumes').selectAll().where('id', '>', after).orderBy('id').limit(limit).execute(),
      (row) => row.id,
      '',
    ),
    layers: await inPieces(
      async (after, limit) =>
        await tx.selectFrom('layers').selectAll().where('alias', '>', after).orderBy('alias').limit(limit).execute(),
      (row) => row.alias,
      0,
    ),
    replicas: await inPieces(
      async (after, limit) => await replicasAfter(tx, after, limit),
      (row) => ({ layer_alias: row.layer_alias, pool_id: row.pool_id }),
      { layer_alias: 0, pool_id: '' },
    ),
    leases: await inPieces(
      async (after, limit) =>
        await tx.selectFrom('leases').selectAll().where('volume_id', '>', after).orderBy('volume_id').limit(limit).execute(),
      (row) => row.volume_id,
      '',
    ),
    pools: await tx.selectFrom('pools').selectAll().orderBy('name').execute(),
  }))
  const homes = new Map<number, string[]>()
  await eachInTurns(rows.replicas, (row) => {
    if (row.state === 'complete') homes.set(row.layer_alias, [...(homes.get(row.layer_alias) ?? []), row.pool_id])
  })
  return {
    ...rows,
    resourcesById: await mapInTurns(rows.resources, (row) => row.id),
    volumesById: await mapInTurns(rows.volumes, (row) => row.id),
    layersByAlias: await mapInTurns(rows.layers, (row) => row.alias),
    homes,
    listings,
  }
}

/** A layer may have several. */
async function replicasAfter(
  tx: CatalogTransaction,
  after: Pick<ReplicaRow, 'layer_alias' | 'pool_id'>,
  limit: number,
): Promise<ReplicaRow[]> {
  return await tx
    .selectFrom('replicas')
    .selectAll()
    .where((query) =>
      query.or([
        query('layer_alias', '>', after.layer_alias),
        query.and([query('layer_alias', '=', after.layer_alias), query('pool_id', '>', after.pool_id)]),
      ]),
    )
    .orderBy('layer_alias')
    .orderBy('pool_id')
    .limit(limit)
    .execute()
}
