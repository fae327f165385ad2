/**
 * How much a pool's volumes may have together.
 *
 * Rules:
 * - Only volumes count, with their whole size: what an image or a snapshot takes is stored already, and grows no more.
 * - The limit is asked where a volume is made or made larger, in the transaction that does it, so that two at a time cannot
 *   pass it together. A rollback to a larger snapshot is not refused: it takes back what was there. A limit that is set
 *   below what is there takes nothing away.
 */
import { AtollError, formatSize, type CatalogTransaction } from '@atoll/core'
import type { MapperContext } from './context.ts'
import { parsePoolSettings } from './pool-settings.ts'

export interface OvercommitLimit {
  readonly poolId: string
  readonly poolName: string
  readonly ratio: number
  readonly totalBytes: number
  /** What all volumes may have together. */
  readonly maxBytes: number
}

/**
 * The limit of a pool, null: there is none. Asks the backend, so call it before the transaction.
 * @throws AtollError POOL_UNAVAILABLE, IO_ERROR
 */
export async function overcommitLimit(context: MapperContext, poolId: string): Promise<OvercommitLimit | null> {
  const row = await context.catalog.db
    .selectFrom('pools')
    .select(['name', 'settings'])
    .where('id', '=', poolId)
    .executeTakeFirst()
  // A pool that is gone is refused by whoever wants something of it.
  const ratio = row === undefined ? null : parsePoolSettings(row.settings).overcommit
  if (row === undefined || ratio === null) return null
  const { totalBytes } = await context.pools.handle(poolId).usage()
  return { poolId, poolName: row.name, ratio, totalBytes, maxBytes: Math.floor(totalBytes * ratio) }
}

/**
 * Refuses `addedBytes` more of volumes if they would pass the limit.
 * @throws AtollError POOL_OVERCOMMITTED with the figures
 */
export async function requireProvisionable(
  tx: CatalogTransaction,
  limit: OvercommitLimit | null,
  addedBytes: number,
): Promise<void> {
  if (limit === null) return
  const { poolId, poolName, ratio, totalBytes, maxBytes } = limit
  const presentBytes = (await provisionedBytes(tx)).get(poolId) ?? 0
  if (presentBytes + addedBytes <= maxBytes) return
  throw new AtollError(
    'POOL_OVERCOMMITTED',
    `pool ${poolName} has ${formatSize(totalBytes)}; with overcommit=${ratio} its volumes may have ${formatSize(maxBytes)} together, ` +
      `they have ${formatSize(presentBytes)}, and this would add ${formatSize(addedBytes)}: delete or shrink volumes, use another pool, ` +
      `or raise the limit with 'atoll pool set ${poolName} overcommit=…'`,
    { values: { poolId, pool: poolName, overcommit: ratio, totalBytes, maxBytes, provisionedBytes: presentBytes, addedBytes } },
  )
}

/** What the volumes of each pool have together; exact up to 2^53, which a sum of volumes can pass. */
export async function provisionedBytes(db: CatalogTransaction): Promise<Map<string, number>> {
  const rows = await db
    .selectFrom('resources')
    // As a float: a sum of integers fails where it overflows.
    .select((query) => ['home_pool_id', query.fn<number>('total', ['size_bytes']).as('bytes')])
    .where('kind', '=', 'volume')
    .groupBy('home_pool_id')
    .execute()
  return new Map(rows.map((row) => [row.home_pool_id, row.bytes]))
}
