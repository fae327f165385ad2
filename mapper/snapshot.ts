/**
 * Snapshots: the content of one volume, or of several at one point in time, under a name. See share.ts for the order that
 * keeps them whole.
 */
import { AtollError, type ResourceRow } from '@atoll/core'
import type { MapperContext } from './context.ts'
import { shareVolumes, swapDeadlineMs } from './share.ts'

export interface SnapshotItem {
  readonly volumeId: string
  readonly name: string
}

/** Volumes of one group: all gates stay closed until the last one has drained. */
export const groupVolumesMax = 256

/**
 * Takes a snapshot of each volume, all at one point in time; all or none. Returns when they are durable.
 * @throws AtollError ARGUMENT_INVALID for an empty group, a volume named twice or more than `groupVolumesMax`; VOLUME_NOT_FOUND,
 * RESOURCE_STATUS, SNAPSHOT_BUSY, LEASE_LOST, DEVICE_POISONED, NO_SPACE, IO_ERROR, POOL_UNAVAILABLE
 */
export async function snapshot(
  context: MapperContext,
  items: readonly SnapshotItem[],
  options: { deadlineMs?: number } = {},
): Promise<{ rows: ResourceRow[]; pauseMs: number }> {
  const volumeIds = items.map((item) => item.volumeId).toSorted()
  if (items.length === 0 || items.length > groupVolumesMax || new Set(volumeIds).size !== items.length) {
    throw new AtollError(
      'ARGUMENT_INVALID',
      `a snapshot of ${items.length} volumes: 1 to ${groupVolumesMax} different ones are wanted`,
      {
        values: { volumeIds, maxCount: groupVolumesMax },
      },
    )
  }
  const made = new Map<string, ResourceRow>()
  const { pauseMs } = await shareVolumes(context, volumeIds, options.deadlineMs ?? swapDeadlineMs, async (tx, shared) => {
    const now = context.clock.nowMs()
    for (const { volume, root, sizeBytes } of shared) {
      const row = await tx
        .insertInto('resources')
        .values({
          id: context.newId(),
          project_id: volume.project_id,
          kind: 'snapshot',
          name: items.find((item) => item.volumeId === volume.id)?.name ?? '',
          size_bytes: sizeBytes,
          root_word: root.word,
          root_crc: root.crc,
          home_pool_id: volume.home_pool_id,
          parent_id: volume.id,
          volume_id: volume.id,
          status: 'available',
          created_at: now,
          updated_at: now,
        })
        .returningAll()
        .executeTakeFirstOrThrow()
      made.set(volume.id, row)
    }
  })
  return { rows: items.map((item) => made.get(item.volumeId) as ResourceRow), pauseMs }
}
