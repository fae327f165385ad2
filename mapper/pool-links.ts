/**
 * Which pools' resources may read layers that lie in other pools.
 *
 * A clone into another pool shares the map of its source, as one in the same pool does: it writes to layers of its own pool
 * and reads what it did not write from the layers of the other one. No byte is copied, and nothing of it shows in the rows.
 *
 * Rules:
 * - A link (reader, source) is made in the transaction that makes the first such resource, and the exports of both pools have it
 *   when that operation returns. Links are followed: what reads from a reader reads from its sources, too.
 * - A link stays until one of its pools is deleted, or a reclaim has seen that no map needs it any more and the export of the reader
 *   says so, too. So links say what may be; what is, the maps say (pool-reads.ts).
 * - A pool that is linked and has no row is one of a lost catalog that was not imported yet (*absent*). While a reader is absent,
 *   nothing of its sources is freed: its volumes would miss it.
 */
import type { CatalogTransaction } from '@atoll/core'
import { z } from 'zod'

/** A pool as a link names it. */
export interface LinkedPool {
  readonly id: string
  readonly name: string
  readonly driver: string
  /** It is not in this catalog. */
  readonly isAbsent: boolean
}

export interface Link {
  readonly reader: string
  readonly source: string
}

export interface PoolLinks {
  readonly links: readonly Link[]
  readonly pools: ReadonlyMap<string, LinkedPool>
  /** Rises with every resource that is made in another pool than its source, also where the link is there already. */
  readonly madeCount: number
}

/** In the table `meta`. Once it only said that there are links: '1'. */
export const poolLinksKey = 'crosses_pools'

const storedSchema = z.object({
  madeCount: z.int().min(0),
  links: z.array(z.tuple([z.string(), z.string()])),
  absent: z.record(z.string(), z.object({ name: z.string(), driver: z.string() })),
})

const none: PoolLinks = { links: [], pools: new Map(), madeCount: 0 }

/** All links there are. */
export async function readLinks(tx: CatalogTransaction): Promise<PoolLinks> {
  const row = await tx.selectFrom('meta').select('value').where('key', '=', poolLinksKey).executeTakeFirst()
  if (row === undefined) return none
  const rows = await tx.selectFrom('pools').select(['id', 'name', 'driver']).execute()
  const pools = new Map<string, LinkedPool>(rows.map((pool) => [pool.id, { ...pool, isAbsent: false }]))
  if (row.value === '1') {
    // Nobody knows which: each may read from each.
    const links = rows.flatMap(({ id: reader }) =>
      rows.filter(({ id }) => id !== reader).map(({ id: source }) => ({ reader, source })),
    )
    return { links, pools, madeCount: 0 }
  }
  const stored = storedSchema.parse(JSON.parse(row.value))
  for (const [id, pool] of Object.entries(stored.absent)) if (!pools.has(id)) pools.set(id, { id, ...pool, isAbsent: true })
  return { links: stored.links.map(([reader, source]) => ({ reader, source })), pools, madeCount: stored.madeCount }
}

/** The pools whose resources may read from this one, by name. */
export function readersOf({ links, pools }: PoolLinks, poolId: string): LinkedPool[] {
  return follow(poolId, (id) => links.filter((link) => link.source === id).map((link) => link.reader), pools)
}

/** The pools that the resources of this one may read from, by name. */
export function sourcesOf({ links, pools }: PoolLinks, poolId: string): LinkedPool[] {
  return follow(poolId, (id) => links.filter((link) => link.reader === id).map((link) => link.source), pools)
}

function follow(from: string, next: (id: string) => string[], pools: PoolLinks['pools']): LinkedPool[] {
  const seen = new Set([from])
  for (const id of seen) for (const other of next(id)) seen.add(other)
  seen.delete(from)
  return [...seen]
    .flatMap((id) => pools.get(id) ?? [])
    .toSorted((a, b) => (a.name === b.name ? (a.id < b.id ? -1 : 1) : a.name < b.name ? -1 : 1))
}

/** From now on resources of `reader` may read from `source`. Inside the write that makes the first one. */
export async function addLink(tx: CatalogTransaction, reader: string, source: string): Promise<void> {
  await addLinks(tx, [{ reader, source }], [])
}

/**
 * Adds links, also of pools that are not here (`named` says what they are called). What changes for a pool goes into its export.
 * Inside a write.
 */
export async function addLinks(
  tx: CatalogTransaction,
  added: readonly Link[],
  named: readonly Pick<LinkedPool, 'id' | 'name' | 'driver'>[],
): Promise<void> {
  const before = await readLinks(tx)
  const isThere = (wanted: Link): boolean =>
    before.links.some((link) => link.reader === wanted.reader && link.source === wanted.source)
  const fresh = added.filter((link) => link.reader !== link.source && !isThere(link))
  const pools = new Map(before.pools)
  for (const row of await tx.selectFrom('pools').select(['id', 'name', 'driver']).execute())
    pools.set(row.id, { ...row, isAbsent: false })
  for (const { id, name, driver } of named) if (!pools.has(id)) pools.set(id, { id, name, driver, isAbsent: true })
  await writeLinks(tx, before, { links: [...before.links, ...fresh], pools, madeCount: before.madeCount + 1 })
}

/**
 * Puts `links` in the place of those in `before`. False, and nothing is changed: other pools were linked, or something was made across
 * pools, since that was read. Inside a write.
 */
export async function replaceLinks(tx: CatalogTransaction, before: PoolLinks, links: readonly Link[]): Promise<boolean> {
  const now = await readLinks(tx)
  if (now.madeCount !== before.madeCount || now.links.length !== before.links.length) return false
  await writeLinks(tx, now, { ...now, links })
  return true
}

/** The pool is deleted, or given up: who read from it may read on from what it read from. Inside a write. */
export async function dropFromLinks(tx: CatalogTransaction, poolId: string): Promise<void> {
  const before = await readLinks(tx)
  const readers = before.links.filter((link) => link.source === poolId).map((link) => link.reader)
  const sources = before.links.filter((link) => link.reader === poolId).map((link) => link.source)
  if (readers.length + sources.length === 0) return
  const rest = before.links.filter((link) => link.reader !== poolId && link.source !== poolId)
  const bridges = readers.flatMap((reader) => sources.map((source) => ({ reader, source })))
  for (const bridge of bridges) {
    if (bridge.reader === bridge.source) continue
    if (rest.some((link) => link.reader === bridge.reader && link.source === bridge.source)) continue
    rest.push(bridge)
  }
  const pools = new Map(before.pools)
  pools.delete(poolId)
  await writeLinks(tx, before, { ...before, links: rest, pools })
}

async function writeLinks(tx: CatalogTransaction, before: PoolLinks, after: PoolLinks): Promise<void> {
  const absent = Object.fromEntries(
    [...after.pools.values()].filter((pool) => pool.isAbsent).map(({ id, name, driver }) => [id, { name, driver }]),
  )
  const { links, madeCount } = after
  const value = JSON.stringify({ links: links.map(({ reader, source }) => [reader, source]), absent, madeCount })
  await tx
    .insertInto('meta')
    .values({ key: poolLinksKey, value })
    .onConflict((conflict) => conflict.column('key').doUpdateSet({ value }))
    .execute()
  // The outbox: the exports of these pools say something else from now on.
  for (const { id } of [...after.pools.values()].filter((pool) => !pool.isAbsent)) {
    if (describe(before, id) === describe(after, id)) continue
    await tx.insertInto('export_changes').values({ table_name: 'link', row_key: id, pool_id: id }).execute()
  }
}

/** What the export of a pool says about its links. */
function describe(links: PoolLinks, poolId: string): string {
  return JSON.stringify([readersOf(links, poolId), sourcesOf(links, poolId)].map((pools) => pools.map((pool) => pool.id)))
}

/** How a message calls pools: `"files" (driver file, ID)`. */
export function namePools(pools: readonly Pick<LinkedPool, 'id' | 'name' | 'driver'>[]): string {
  return pools.map(({ id, name, driver }) => `"${name}" (driver ${driver}, ${id})`).join(', ')
}
