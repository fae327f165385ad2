/**
 * Accepting an older catalog: the operator wants what it says, and gives up what its pool's export has newer. And giving up pools
 * of a lost catalog that were linked with this one (pool-links.ts) and will never be imported: what they read may be freed.
 *
 * Rules:
 * - Nothing is done without a confirmation; what would be given up is told by name before, and logged.
 * - One durable commit decides (exporter.ts): a crash leaves the pool ahead as it was, or accepted, and its export is written
 *   anew at the next start.
 * - What this catalog must not use (older-catalog.ts) stays refused: what it held may have been freed.
 * - Layers that only the newer state knew get no row. Their files stay (I11) and are named.
 */
import { AtollError, type ExportedRow, type ResourceKind } from '@atoll/core'
import type { MapperContext } from './context.ts'
import { type ExportDamage, loadExport } from './export-load.ts'
import { dropFromLinks, type LinkedPool } from './pool-links.ts'
import type { PoolService } from './pool-service.ts'
import { unknownLayers } from './recover.ts'

/** A resource of which the newer state is given up. */
export interface GivenUp {
  readonly kind: ResourceKind
  readonly id: string
  readonly name: string
}

export interface PoolAcceptReport {
  readonly poolId: string
  readonly name: string
  /** False: nothing was changed, this is what would be given up. */
  readonly accepted: boolean
  /** When the last record of the export was written, milliseconds since 1970. */
  readonly exportedAt: number | null
  /** Only the export has them: they are gone. */
  readonly onlyInExport: readonly GivenUp[]
  /** The export has a newer state of them: what is here is refused, since a part of it may be gone. */
  readonly changed: readonly GivenUp[]
  /** The newer state had deleted them: refused for the same reason. */
  readonly deleted: readonly GivenUp[]
  /** Pools of a lost catalog that are not here and read from this one: what only they read goes. */
  readonly missingReaders: readonly LinkedPool[]
  /** Pools of a lost catalog that are not here and that this one reads from: what reads from them cannot be opened. */
  readonly missingSources: readonly LinkedPool[]
  /** Files that no row knows: they stay. */
  readonly unknownLayers: readonly string[]
  /** What cannot be read of the export: there may be more that is given up. */
  readonly damages: readonly ExportDamage[]
}

/** Names in one line of the log. */
const loggedMax = 200

/**
 * Says what an acceptance of this catalog gives up of a pool whose export is newer, or that is linked with pools that are not here,
 * and with `confirmed` does it.
 * @throws AtollError POOL_NOT_FOUND, POOL_UNAVAILABLE, POOL_NOT_AHEAD, IO_ERROR, FORMAT_VERSION
 */
export async function acceptPool(
  context: MapperContext,
  service: PoolService,
  poolId: string,
  { confirmed }: { confirmed: boolean },
): Promise<PoolAcceptReport> {
  const pool = await service.get(poolId)
  const { store } = await service.handle(poolId)
  return await context.locks.run([poolId], async () => {
    const isAhead = context.exporter.status(poolId)?.state === 'ahead'
    const { readers, sources } = await service.links(poolId)
    const missingReaders = readers.filter((other) => other.isAbsent)
    const missingSources = sources.filter((other) => other.isAbsent)
    if (!isAhead && missingReaders.length + missingSources.length === 0) {
      throw new AtollError(
        'POOL_NOT_AHEAD',
        `the export of pool "${pool.name}" is not newer than the catalog: nothing is to be accepted`,
        {
          values: { poolId },
        },
      )
    }
    const newer = isAhead ? await loadExport(store, { rowsOnly: true }) : null
    const present = await context.catalog.db.selectFrom('resources').selectAll().where('home_pool_id', '=', poolId).execute()
    const known = new Set(present.map((row) => row.id))
    const refused = isAhead ? context.olderCatalog.refused(poolId) : new Map<string, string>()
    const refusedAs = (verdict: string): GivenUp[] =>
      present.filter((row) => refused.get(row.id) === verdict).map(({ kind, id, name }) => ({ kind, id, name }))
    const exported = [...(newer?.rows.get('resources')?.values() ?? [])].map(({ row }) => row)
    const report = {
      poolId,
      name: pool.name,
      accepted: confirmed,
      exportedAt: newer?.header.writtenAt ?? null,
      onlyInExport: exported.filter((row) => !known.has(String(row['id']))).map(givenUp),
      changed: refusedAs('changed'),
      deleted: refusedAs('deleted'),
      missingReaders,
      missingSources,
      unknownLayers: await unknownLayers(context, poolId),
      damages: newer?.damages ?? [],
    }
    if (!confirmed) return report
    const { onlyInExport, changed, deleted } = report
    const ids = (rows: readonly GivenUp[]) => rows.slice(0, loggedMax).map((row) => `${row.kind} ${row.id} (${row.name})`)
    context.log.warn(
      {
        poolId,
        pool: pool.name,
        onlyInExport: ids(onlyInExport),
        changed: ids(changed),
        deleted: ids(deleted),
        counts: { onlyInExport: onlyInExport.length, changed: changed.length, deleted: deleted.length },
        unknownLayers: report.unknownLayers.slice(0, loggedMax),
        missingPools: [...missingReaders, ...missingSources].map(({ id, name }) => `${id} (${name})`),
      },
      'the operator accepts this catalog for the pool: what its export has newer is given up',
    )
    await context.catalog.write(async (tx) => {
      for (const { id } of [...missingReaders, ...missingSources]) await dropFromLinks(tx, id)
    })
    if (isAhead) await context.exporter.accept(poolId)
    else await context.exporter.flushed([poolId])
    context.log.warn({ poolId, export: context.exporter.status(poolId)?.state }, 'this catalog was accepted for the pool')
    return report
  })
}

function givenUp(row: ExportedRow): GivenUp {
  return { kind: row['kind'] as ResourceKind, id: String(row['id']), name: String(row['name']) }
}
