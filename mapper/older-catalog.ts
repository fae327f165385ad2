/**
 * What must not be used of a catalog that is older than its pools (restored from a backup, copied back by hand).
 *
 * A snapshot that was deleted since, its space reclaimed, would read as zeros: nothing in its own rows, maps and layers says so.
 * The pool's export does: it has the newest state of every resource. When it is found to be newer than the catalog, each
 * resource of the pool is compared with it, once, and what was deleted or changed since is refused from then on. Everything
 * else is as it was: its slots were reached by the newest state, so nobody has freed them.
 *
 * Rules:
 * - The verdicts are kept in this catalog (table `meta`), in the transaction that marks its pool: what is made in it later is
 *   in no export and is its own. A newer catalog that is found after all knows nothing of them.
 * - A volume whose map, layers and checkpoint are the same was at most opened since: it gets the epoch that it had there, so that
 *   its journal is replayed, and is the newest then.
 * - An export that is damaged may lack resources: what it does not have is refused.
 */
import { AtollError, type CatalogTransaction, type ExportedRow, type ResourceRow } from '@atoll/core'
import type { LoadedExport } from './export-load.ts'

export type Verdict = 'deleted' | 'changed'

/** What of an export is compared. */
type NewerState = Pick<LoadedExport, 'rows' | 'header'>

const keyOf = (poolId: string): string => `behind.${poolId}`

export class OlderCatalog {
  readonly #verdicts = new Map<string, Map<string, Verdict>>()

  /** Verdicts of an earlier time. */
  async recall(tx: CatalogTransaction, poolId: string): Promise<void> {
    const row = await tx.selectFrom('meta').select('value').where('key', '=', keyOf(poolId)).executeTakeFirst()
    this.#verdicts.set(
      poolId,
      new Map(Object.entries((row === undefined ? {} : JSON.parse(row.value)) as Record<string, Verdict>)),
    )
  }

  /** Compares the resources of a pool with its export, which is newer. Inside the write that marks the pool. */
  async compare(tx: CatalogTransaction, poolId: string, newer: NewerState): Promise<void> {
    const resources = await tx.selectFrom('resources').selectAll().where('home_pool_id', '=', poolId).execute()
    const volumes = new Map((await tx.selectFrom('volumes').selectAll().execute()).map((row) => [row.id, row]))
    const verdicts: Record<string, Verdict> = {}
    for (const resource of resources) {
      const found = newer.rows.get('resources')?.get(resource.id)?.row
      const volume = volumes.get(resource.id)
      const foundVolume = newer.rows.get('volumes')?.get(resource.id)?.row
      if (found === undefined) verdicts[resource.id] = 'deleted'
      else if (!hasSameRoot(resource, found) || (volume === undefined) !== (foundVolume === undefined))
        verdicts[resource.id] = 'changed'
      if (verdicts[resource.id] !== undefined || volume === undefined || foundVolume === undefined) continue
      const isSame = ['active_alias', 'map_lsn'].every((column) => volume[column as 'map_lsn'] === foundVolume[column])
      if (!isSame) verdicts[resource.id] = 'changed'
      const epoch = Number(foundVolume['epoch'])
      if (isSame && epoch > volume.epoch) await tx.updateTable('volumes').set({ epoch }).where('id', '=', volume.id).execute()
    }
    await tx
      .replaceInto('meta')
      .values({ key: keyOf(poolId), value: JSON.stringify(verdicts) })
      .execute()
    this.#verdicts.set(poolId, new Map(Object.entries(verdicts)))
  }

  /** The volume was rolled back: its content is what it has in this catalog. Inside the write that does it; `forget` follows. */
  async forgetIn(tx: CatalogTransaction, row: Pick<ResourceRow, 'id' | 'home_pool_id'>): Promise<void> {
    const verdicts = this.#verdicts.get(row.home_pool_id)
    if (verdicts?.has(row.id) !== true) return
    const rest = Object.fromEntries([...verdicts].filter(([id]) => id !== row.id))
    await tx
      .replaceInto('meta')
      .values({ key: keyOf(row.home_pool_id), value: JSON.stringify(rest) })
      .execute()
  }

  forget(row: Pick<ResourceRow, 'id' | 'home_pool_id'>): void {
    this.#verdicts.get(row.home_pool_id)?.delete(row.id)
  }

  /** Resources of a pool that are refused, with the reason. */
  refused(poolId: string): ReadonlyMap<string, Verdict> {
    return this.#verdicts.get(poolId) ?? new Map<string, Verdict>()
  }

  isRefused(row: Pick<ResourceRow, 'id' | 'home_pool_id'>): boolean {
    return this.#verdicts.get(row.home_pool_id)?.has(row.id) === true
  }

  /** @throws AtollError CATALOG_BEHIND for a resource that a newer state of the catalog has deleted or changed */
  requireNewest(row: Pick<ResourceRow, 'id' | 'home_pool_id' | 'kind' | 'name'>): void {
    const verdict = this.#verdicts.get(row.home_pool_id)?.get(row.id)
    if (verdict === undefined) return
    const what =
      verdict === 'deleted'
        ? 'a newer state of this catalog has deleted it, and what it held may have been freed'
        : 'a newer state of this catalog has changed it'
    throw new AtollError(
      'CATALOG_BEHIND',
      `${row.kind} ${row.id} (${row.name}) cannot be used: ${what}; bring the newer catalog back, or import the pool into a fresh home (atoll pool import)`,
      { values: { id: row.id, resourceId: row.id, poolId: row.home_pool_id } },
    )
  }
}

function hasSameRoot(row: ResourceRow, found: ExportedRow): boolean {
  return BigInt(String(found['root_word'])) === row.root_word && Number(found['root_crc']) === row.root_crc
}
