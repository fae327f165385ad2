/**
 * What a move would do, and whether it can: asked before its job is made, and again when the job begins to copy. Changes nothing.
 */
import { AtollError, formatSize, type PoolRow, type ResourceKind } from '@atoll/core'
import type { PoolHandle } from '@atoll/southbound'
import type { MapperContext } from './context.ts'
import { type DrainRequest, MoveNeeds, type MoveRequest, type LayerPlaces } from './move-needs.ts'
import { overcommitLimit, requireProvisionable } from './overcommit.ts'
import { readersOf, readLinks, namePools } from './pool-links.ts'
import { requireNotDraining } from './pool-settings.ts'
import { requireAvailable, requireKind, requireVolumeRow } from './rows.ts'
import { slotCountOf } from './runs.ts'
import { moveRunningError, requireNoMoveOf, requireNotMoving, runningMoves } from './running-moves.ts'

export interface MovePlan {
  /** What gets another home. */
  readonly resources: readonly {
    readonly id: string
    readonly kind: ResourceKind
    readonly name: string
    readonly sizeBytes: number
  }[]
  /** Layers that the target lacks, or has in part. */
  readonly layerCount: number
  /** At most: zeros among them are not copied. */
  readonly bytesToCopy: number
  /** Shared by the backend instead of copied. */
  readonly bytesToOffload: number
  /** In the target already. */
  readonly bytesThere: number
  /** null: the backend does not say how large it is, as a Ceph cluster without a manager. */
  readonly targetFreeBytes: number | null
}

const slotBytes = 4096
/** Unfinished resources named in a refusal; their number is in the message. */
const namedMax = 10

/**
 * Looks whether a move can be made, and how much it is.
 * @throws AtollError VOLUME_NOT_FOUND, POOL_NOT_FOUND, RESOURCE_STATUS, MOVE_RUNNING, MOVE_NEEDLESS, POOL_DRAINING, POOL_UNAVAILABLE,
 * POOL_OVERCOMMITTED, NO_SPACE with the figures; PAGE_MISSING, PAGE_CORRUPT for a map that cannot be read
 */
export async function planMove(context: MapperContext, request: MoveRequest | DrainRequest): Promise<MovePlan> {
  const target = await requireTarget(context, request)
  if ('volumeId' in request) await requireMovable(context, request)
  else await requireDrainable(context, request)
  const needs = await MoveNeeds.read(context, request)
  try {
    if ('volumeId' in request && (await isNeedless(context, request, needs))) {
      throw new AtollError(
        'MOVE_NEEDLESS',
        `everything of volume ${request.volumeId} that is to be moved is in that pool already`,
        {
          values: { volumeId: request.volumeId, poolId: request.targetPoolId },
        },
      )
    }
    const limit = await overcommitLimit(context, target.poolId)
    const coming = needs.movers.filter((mover) => mover.kind === 'volume' && mover.home_pool_id !== target.poolId)
    await requireProvisionable(
      context.catalog.db,
      limit,
      coming.reduce((sum, mover) => sum + mover.size_bytes, 0),
    )
    const plan = await describe(context, needs, target)
    if (plan.targetFreeBytes !== null && plan.bytesToCopy > plan.targetFreeBytes) {
      const free = formatSize(plan.targetFreeBytes)
      throw new AtollError(
        'NO_SPACE',
        `up to ${formatSize(plan.bytesToCopy)} would have to be copied and the target pool has ${free} free: delete something there and reclaim, or make it larger`,
        { values: { poolId: target.poolId, bytesToCopy: plan.bytesToCopy, freeBytes: plan.targetFreeBytes } },
      )
    }
    return plan
  } finally {
    needs.clear()
  }
}

async function requirePool({ catalog }: MapperContext, id: string): Promise<PoolRow> {
  const row = await catalog.db.selectFrom('pools').selectAll().where('id', '=', id).executeTakeFirst()
  if (row === undefined) throw new AtollError('POOL_NOT_FOUND', `there is no pool ${id}`, { values: { id } })
  return row
}

async function requireTarget(context: MapperContext, { jobId, targetPoolId }: MoveRequest | DrainRequest): Promise<PoolHandle> {
  const { db } = context.catalog
  const row = await requirePool(context, targetPoolId)
  await requireNotDraining(db, targetPoolId)
  const drain = (await runningMoves(db)).find((move) => move.kind === 'drain' && move.subject === targetPoolId)
  if (drain !== undefined && drain.jobId !== jobId)
    throw moveRunningError(drain, `pool "${row.name}" is being drained`, 'nothing is moved into it')
  const handle = context.pools.handle(targetPoolId)
  const stalled = handle.health().conditions.find((condition) => condition.severity === 'error')
  if (stalled === undefined) return handle
  throw new AtollError('POOL_UNAVAILABLE', `nothing is moved into pool "${row.name}" as it is: ${stalled.message}`, {
    values: { poolId: targetPoolId },
  })
}

async function requireMovable(context: MapperContext, { jobId, volumeId }: MoveRequest): Promise<void> {
  const volume = await requireKind(context.catalog.db, volumeId, 'volume')
  requireAvailable(volume)
  context.olderCatalog.requireNewest(volume)
  await requireNotMoving(context.catalog.db, volume, {
    what: 'it is not moved a second time',
    exceptJobId: jobId,
    orDrained: true,
  })
  context.pools.handle(volume.home_pool_id)
}

async function requireDrainable(context: MapperContext, { jobId, poolId, targetPoolId }: DrainRequest): Promise<void> {
  const { db } = context.catalog
  const row = await requirePool(context, poolId)
  if (poolId === targetPoolId) {
    throw new AtollError('ARGUMENT_INVALID', `pool "${row.name}" cannot be drained into itself: name another pool`, {
      values: { poolId },
    })
  }
  context.pools.handle(poolId)
  await requireNoMoveOf(db, row, { what: 'it is not drained', exceptJobId: jobId })
  const absent = readersOf(await readLinks(db), poolId).filter((pool) => pool.isAbsent)
  if (absent.length > 0) {
    throw new AtollError(
      'POOL_UNAVAILABLE',
      `pools of the lost catalog that are not here read from pool "${row.name}" (${namePools(absent)}): import them, or give them up (atoll pool accept)`,
      { values: { poolId, readerIds: absent.map((pool) => pool.id) } },
    )
  }
  await requireNothingUnfinished(context, row)
}

/** What is being imported or uploaded into the pool is written there until it is finished. @throws AtollError RESOURCE_STATUS */
export async function requireNothingUnfinished(
  { catalog }: Pick<MapperContext, 'catalog'>,
  pool: Pick<PoolRow, 'id' | 'name'>,
): Promise<void> {
  const rows = await catalog.db
    .selectFrom('resources')
    .select(['id', 'kind', 'name'])
    .where('home_pool_id', '=', pool.id)
    .where('status', '=', 'creating')
    .orderBy('id')
    .execute()
  if (rows.length === 0) return
  const names = rows.slice(0, namedMax).map((row) => `${row.kind} "${row.name}"`)
  throw new AtollError(
    'RESOURCE_STATUS',
    `pool "${pool.name}" cannot be drained while something is being made in it (${names.join(', ')}${rows.length > namedMax ? ', …' : ''}): wait until that is done, or cancel it`,
    { values: { poolId: pool.id, count: rows.length } },
  )
}

/** Home, writes and layers are all there. */
async function isNeedless(context: MapperContext, { volumeId, targetPoolId }: MoveRequest, needs: MoveNeeds): Promise<boolean> {
  if (needs.fromPoolId !== targetPoolId || needs.layers.length + needs.unsealed.length > 0) return false
  const { active_alias: activeAlias } = await requireVolumeRow(context.catalog.db, volumeId)
  const [active] = await context.layers.homes([activeAlias], targetPoolId)
  return active?.poolId === targetPoolId
}

/** The figures of a move. */
export async function describe(context: MapperContext, needs: MoveNeeds, target: PoolHandle): Promise<MovePlan> {
  let bytesToCopy = 0
  let bytesToOffload = 0
  let bytesThere = 0
  const { offloadDomain } = target.capabilities
  const count = (poolId: string, bytes: number): void => {
    const canOffload = offloadDomain !== null && context.pools.find(poolId)?.capabilities.offloadDomain === offloadDomain
    if (canOffload) bytesToOffload += bytes
    else bytesToCopy += bytes
  }
  for (const { layer } of needs.layers) {
    for (const { sourcePoolId, runs } of await needs.partsOf(layer)) {
      count(sourcePoolId, Math.min(slotCountOf(runs) * slotBytes, await allocatedIn(context, layer, sourcePoolId)))
    }
  }
  // What a volume writes now becomes such a layer.
  for (const layer of needs.unsealed) {
    const poolId = layer.replicas[0]?.poolId
    if (poolId !== undefined) count(poolId, await allocatedIn(context, layer, poolId))
  }
  for (const layer of needs.present) bytesThere += await allocatedIn(context, layer, target.poolId)
  const { freeBytes, totalBytes } = await target.usage()
  return {
    resources: needs.movers.map(({ id, kind, name, size_bytes: sizeBytes }) => ({ id, kind, name, sizeBytes })),
    layerCount: needs.layers.length + needs.unsealed.length,
    bytesToCopy,
    bytesToOffload,
    bytesThere,
    targetFreeBytes: totalBytes === 0 ? null : freeBytes,
  }
}

/** What a layer has allocated; a hint (I4), which is what an estimate wants: a fresh map names far more than was ever written. */
async function allocatedIn({ pools }: MapperContext, layer: Pick<LayerPlaces, 'id'>, poolId: string): Promise<number> {
  const [bytes = 0] = await pools.handle(poolId).store.allocatedBytes([layer.id])
  return Math.max(0, bytes)
}
