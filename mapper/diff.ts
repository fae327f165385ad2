/**
 * What changed between two resources: the tree difference of their maps, shared subtrees pruned.
 *
 * Equal owners mean equal bytes, because sealed layers never change and an active layer is named by its own volume alone; so
 * the difference is exact or too large, never too small.
 */
import type { FrozenMap } from '@atoll/native'
import { checkpointLocked } from './checkpoint.ts'
import type { MapperContext } from './context.ts'
import { loadMap } from './maps.ts'
import { settleLocked } from './open.ts'
import { holeOwner, rootOf } from './root.ts'
import { requireAvailable, requireResource } from './rows.ts'
import { roundUpToSlot, slotBytes } from './size.ts'

export interface DiffRange {
  readonly offsetBytes: number
  readonly lengthBytes: number
  /** zero: reads as zeros now; data: read it. */
  readonly kind: 'data' | 'zero'
}

/**
 * Ranges of `toId` whose content may differ from `fromId`'s, ascending, neighbours of one kind merged. Any two resources may
 * be compared; where the second is longer, its tail counts against zeros. An open volume is compared as of now.
 * @throws AtollError RESOURCE_NOT_FOUND, RESOURCE_STATUS, PAGE_MISSING, PAGE_CORRUPT, and what a checkpoint throws
 */
export async function diff(context: MapperContext, fromId: string, toId: string): Promise<DiffRange[]> {
  return await context.locks.run([fromId, toId], async () => {
    const from = await durableMap(context, fromId)
    const to = await durableMap(context, toId)
    const quads = await to.map.diff(from.map, roundUpToSlot(to.sizeBytes))
    return rangesOf(quads, to.sizeBytes)
  })
}

async function durableMap(context: MapperContext, id: string): Promise<{ map: FrozenMap; sizeBytes: number }> {
  const row = await requireResource(context.catalog.db, id)
  requireAvailable(row)
  const open = context.open.volume(id)
  if (open !== undefined) await checkpointLocked(context, open)
  else if (row.kind === 'volume') await settleLocked(context, id)
  // What an open device has of it in memory is not read again.
  const durable = await requireResource(context.catalog.db, id)
  return { map: await loadMap(context, id, rootOf(durable)), sizeBytes: durable.size_bytes }
}

/** Quads of start slot, slot count, new owner, old owner as byte ranges within the size. */
function rangesOf(quads: Float64Array, sizeBytes: number): DiffRange[] {
  const ranges: { offsetBytes: number; lengthBytes: number; kind: 'data' | 'zero' }[] = []
  for (let index = 0; index + 3 < quads.length; index += 4) {
    const offsetBytes = (quads[index] ?? 0) * slotBytes
    const lengthBytes = Math.min((quads[index + 1] ?? 0) * slotBytes, sizeBytes - offsetBytes)
    if (lengthBytes <= 0) continue
    const kind = quads[index + 2] === holeOwner ? 'zero' : 'data'
    const last = ranges.at(-1)
    if (last !== undefined && last.kind === kind && last.offsetBytes + last.lengthBytes === offsetBytes)
      last.lengthBytes += lengthBytes
    else ranges.push({ offsetBytes, lengthBytes, kind })
  }
  return ranges
}
