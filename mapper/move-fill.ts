/**
 * Copying what a move needs into the target: layers are claimed, then filled piece by piece.
 *
 * Rules:
 * - Claiming is one transaction: a `filling` replica for every layer that the target lacks, the mark of the job on every one there
 *   that lacks something; all or none. Who finds a layer with another job's mark waits, and holds nothing meanwhile (I2). No reclaim runs at
 *   that moment; later ones leave marked layers alone, in every pool.
 * - I11: the rows first, then the files. A file of such a layer that is there without a row of ours is somebody's: it is refused.
 * - A `filling` replica is read by nobody. What is filled into one that is read already are slots that nobody reads there.
 * - A cursor says: what is needed of all layers before its alias, of its layer from pools before its source, and from that below
 *   its slot, is durable in the target and was read back. It stays true when others come into the target (cover.ts fills in for them).
 * - Layers that turn out to be needed after the first claim are not the cursor's: they are copied when the home changes.
 */
import { AtollError, isAtollError, type JsonObject } from '@atoll/core'
import type { MapperContext } from './context.ts'
import { type DrainRequest, type LayerPlaces, MoveNeeds, type MoveRequest, type NeededLayer } from './move-needs.ts'
import { removeCondemned, sealClosing } from './recover.ts'
import { clipRuns } from './runs.ts'

/** What `fillNext` did. */
export interface FillProgress {
  /** Where the next call goes on. */
  readonly cursor: JsonObject
  readonly isDone: boolean
  readonly copiedBytes: number
  readonly offloadedBytes: number
  /** Zeros that were not copied. */
  readonly skippedBytes: number
}

export interface FillOptions {
  /** null: as fast as it goes. */
  readonly limitBytesPerSecond: number | null
  /** No further piece is begun when this much was copied. Default: 256 MiB. */
  readonly pieceBytes?: number
  readonly signal?: AbortSignal
}

/** A call copies about this much, or for about this long. */
const pieceBytesMax = 256 * 2 ** 20
const pieceMsMax = 1000
/** Files that are made at the same time. */
const filesAtOnce = 8
const slotBytes = 4096

/** Waits for: a layer that another job has. */
export interface ClaimConflict {
  readonly waitsForJobId: string
}

/**
 * Marks what is needed as the job's, and makes the files. Called while no reclaim runs and nobody comes into the target. `marker`:
 * the mark.
 * @throws AtollError LAYER_EXISTS naming a file that is nobody's, POOL_UNAVAILABLE, NO_SPACE, RESOURCE_STATUS for a volume that writes
 * elsewhere still
 */
export async function claimLayers(
  context: MapperContext,
  request: MoveRequest | DrainRequest,
  needs: Pick<MoveNeeds, 'layers' | 'unsealed'>,
  marker: string,
): Promise<ClaimConflict | null> {
  const { catalog, layers, pools } = context
  const target = pools.handle(request.targetPoolId)
  requireSealed(needs)
  const wanted = needs.layers.filter(({ layer }) => !isMarked(layer, request.targetPoolId, marker))
  for (const { layer } of wanted) {
    const present = layer.replicas.find((replica) => replica.poolId === target.poolId)
    if (present === undefined && (await target.layerExists(layer.id))) throw strayFileError(layer, target.poolId)
    if (present?.state !== 'condemned') continue
    throw new AtollError(
      'POOL_UNAVAILABLE',
      `what an earlier move left of layer ${layer.id} in pool ${target.poolId} cannot be removed yet: see 'atoll pool show'`,
      { values: { poolId: target.poolId, layerId: layer.id } },
    )
  }
  const conflict = await catalog.write(async (tx) => {
    const aliases = wanted.map(({ layer }) => layer.alias)
    const other = await tx
      .selectFrom('replicas')
      .select('filling_job')
      .where('layer_alias', 'in', aliases)
      .where('filling_job', 'is not', null)
      .where('filling_job', '!=', marker)
      .where('state', '!=', 'condemned')
      .limit(1)
      .executeTakeFirst()
    if (other?.filling_job !== undefined && other.filling_job !== null) return { waitsForJobId: other.filling_job }
    for (const { layer, isNew } of wanted) {
      if (isNew) {
        await tx
          .insertInto('replicas')
          .values({
            layer_alias: layer.alias,
            pool_id: target.poolId,
            project_id: layer.projectId,
            state: 'filling',
            is_primary: false,
            filling_job: marker,
          })
          .execute()
        continue
      }
      await tx
        .updateTable('replicas')
        .set({ filling_job: marker })
        .where('layer_alias', '=', layer.alias)
        .where('pool_id', '=', target.poolId)
        .where('state', '=', 'complete')
        .execute()
    }
    return null
  })
  layers.invalidate(wanted.map(({ layer }) => layer.alias))
  if (conflict !== null) return conflict
  await makeFiles(context, target.poolId, marker)
  return null
}

/** Every layer that the mark is on in the pool has a file there. Made again or not, it is the same. */
export async function makeFiles(context: MapperContext, poolId: string, marker: string): Promise<void> {
  const target = context.pools.handle(poolId)
  const rows = await context.catalog.db
    .selectFrom('replicas')
    .innerJoin('layers', 'layers.alias', 'replicas.layer_alias')
    .select('layers.id')
    .where('replicas.pool_id', '=', poolId)
    .where('replicas.filling_job', '=', marker)
    .where('replicas.state', '=', 'filling')
    .execute()
  for (let start = 0; start < rows.length; start += filesAtOnce) {
    const part = rows.slice(start, start + filesAtOnce)
    await Promise.all(
      part.map(async ({ id }) => {
        try {
          await target.createLayer(id)
        } catch (error) {
          if (!isAtollError(error, 'LAYER_EXISTS')) throw error
        }
      }),
    )
  }
}

export function isMarked(layer: LayerPlaces, poolId: string, marker: string): boolean {
  return layer.replicas.some(
    (replica) => replica.poolId === poolId && replica.fillingJob === marker && replica.state !== 'condemned',
  )
}

/** The needs of a move, once layers that only wait to be sealed are, and what earlier moves left in the target is gone. */
export async function settledNeeds(
  context: MapperContext,
  request: MoveRequest | DrainRequest,
  step: () => void,
): Promise<MoveNeeds> {
  await removeCondemned(context, request.targetPoolId)
  const needs = await MoveNeeds.read(context, request, step)
  const closing = new Set(
    needs.unsealed.filter((layer) => layer.state === 'closing').flatMap((layer) => layer.replicas.map(({ poolId }) => poolId)),
  )
  if (closing.size === 0) return needs
  needs.clear()
  for (const poolId of closing) await sealClosing(context, poolId)
  return await MoveNeeds.read(context, request, step)
}

/** @throws AtollError POOL_UNAVAILABLE, RESOURCE_STATUS if a layer that is to be moved may still change */
export function requireSealed(needs: Pick<MoveNeeds, 'unsealed'>): void {
  const [layer] = needs.unsealed
  if (layer === undefined) return
  const values = { layerId: layer.id, volumeId: layer.volumeId }
  if (layer.state === 'closing') {
    throw new AtollError(
      'POOL_UNAVAILABLE',
      `layer ${layer.id} is not sealed yet, because the export of its pool cannot be written: see 'atoll pool show'`,
      { values },
    )
  }
  throw new AtollError(
    'RESOURCE_STATUS',
    `layer ${layer.id} is still written by ${layer.volumeId}: that is not in the target yet`,
    {
      values,
    },
  )
}

function strayFileError(layer: LayerPlaces, poolId: string): AtollError {
  return new AtollError(
    'LAYER_EXISTS',
    `pool ${poolId} has a file of layer ${layer.id} that this catalog knows nothing of: look at 'atoll pool check', and move it away`,
    { values: { poolId, layerId: layer.id } },
  )
}

/** Cursor of the first piece, and a later one. */
interface Position {
  readonly alias: number
  readonly sourcePoolId: string
  readonly slot: number
}

/**
 * Copies the next piece of the layers: some slots of one, or many small ones; about a second of work.
 * @throws AtollError NO_SPACE, IO_ERROR, POOL_UNAVAILABLE, VERIFY_FAILED; the cursor before it holds, and the same call may be made again
 */
export async function fillPieces(
  context: MapperContext,
  { targetPoolId }: Pick<MoveRequest, 'targetPoolId'>,
  needs: MoveNeeds,
  claimed: readonly NeededLayer[],
  cursor: JsonObject | null,
  options: FillOptions,
): Promise<FillProgress> {
  const began = context.clock.monotonicMs()
  const done = { copiedBytes: 0, offloadedBytes: 0, skippedBytes: 0 }
  let position = cursor as unknown as Position | null
  const limit = options.limitBytesPerSecond
  const wantedBytes = options.pieceBytes ?? pieceBytesMax
  const bytesMax = limit === null ? wantedBytes : Math.max(slotBytes, Math.min(wantedBytes, Math.ceil(limit)))
  for (const { layer } of claimed) {
    if (position !== null && layer.alias < position.alias) continue
    for (const { sourcePoolId, runs } of await needs.partsOf(layer)) {
      const isAt = position?.alias === layer.alias
      if (isAt && sourcePoolId < (position?.sourcePoolId ?? '')) continue
      let slot: number | null = isAt && position?.sourcePoolId === sourcePoolId ? position.slot : 0
      while (slot !== null) {
        const spentMs = context.clock.monotonicMs() - began
        const leftBytes = bytesMax - done.copiedBytes
        if (spentMs >= pieceMsMax || leftBytes <= 0 || options.signal?.aborted === true) {
          return { cursor: { alias: layer.alias, sourcePoolId, slot }, isDone: false, ...done }
        }
        const fromSlot: number = slot
        const report = await context.fillTurns.run([layer.id], async () => {
          return await fillRuns(
            context,
            { layer, sourcePoolId, targetPoolId, runs },
            {
              fromSlot,
              maxBytes: leftBytes,
              maxMilliseconds: Math.max(1, Math.ceil(pieceMsMax - spentMs)),
              ...(limit === null ? {} : { throttle: limit }),
            },
          )
        })
        done.copiedBytes += report.copiedBytes
        done.offloadedBytes += report.offloadedBytes
        done.skippedBytes += report.zeroBytes
        slot = report.nextSlot
      }
      position = { alias: layer.alias, sourcePoolId, slot: Number.MAX_SAFE_INTEGER }
    }
    position = { alias: layer.alias + 1, sourcePoolId: '', slot: 0 }
  }
  return { cursor: { alias: Number.MAX_SAFE_INTEGER, sourcePoolId: '', slot: 0 }, isDone: true, ...done }
}

/** Fills all of the slots, at once. */
export async function fillAll(
  context: MapperContext,
  place: { layer: LayerPlaces; sourcePoolId: string; targetPoolId: string; runs: Float64Array },
): Promise<void> {
  await context.fillTurns.run([place.layer.id], async () => {
    for (let slot: number | null = 0; slot !== null;) {
      const report = await fillRuns(context, place, { fromSlot: slot, maxBytes: pieceBytesMax, maxMilliseconds: pieceMsMax })
      slot = report.nextSlot
    }
  })
}

async function fillRuns(
  context: MapperContext,
  place: { layer: LayerPlaces; sourcePoolId: string; targetPoolId: string; runs: Float64Array },
  limits: { fromSlot: number; maxBytes: number; maxMilliseconds: number; throttle?: number },
) {
  const { engine, pools } = context
  const source = pools.handle(place.sourcePoolId)
  const target = pools.handle(place.targetPoolId)
  const { id } = place.layer
  // Behind its end a layer is a hole, which maps that were uniform once name as well.
  const [lengthBytes = 0] = await source.store.lengthBytes([id])
  if (lengthBytes < 0) {
    throw new AtollError('LAYER_MISSING', `the file of layer ${id} is missing in pool ${source.poolId}`, {
      values: { layerId: id, poolId: source.poolId },
    })
  }
  const { offloadDomain } = target.capabilities
  return await engine.fillPiece({
    source: { id, store: source.store },
    target: { id, store: target.store },
    runs: clipRuns(place.runs, Math.ceil(lengthBytes / slotBytes)),
    offload: offloadDomain !== null && offloadDomain === source.capabilities.offloadDomain,
    ...limits,
  })
}

/**
 * Takes back what a job has claimed: replicas that are not whole are condemned, marks are taken off. Durable on return; the files
 * go as soon as they can.
 */
export async function releaseLayers(context: MapperContext, markers: readonly string[]): Promise<void> {
  const { catalog, layers } = context
  const aliases = await catalog.write(
    async (tx) => {
      const rows = await tx.selectFrom('replicas').select('layer_alias').where('filling_job', 'in', markers).execute()
      const marked = tx.updateTable('replicas').where('filling_job', 'in', markers)
      // The mark stays on what was never complete: nobody can have read it.
      await marked.set({ state: 'condemned' }).where('state', '=', 'filling').execute()
      await marked.set({ filling_job: null }).where('state', '=', 'complete').execute()
      // A process that ends before the job is recorded as cancelled goes on with it: from the start, because what the cursor says is
      // there is not any more.
      await tx.updateTable('jobs').set({ cursor: null }).where('id', 'in', markers).execute()
      return rows.map((row) => row.layer_alias)
    },
    { emergency: true },
  )
  layers.invalidate(aliases)
}
