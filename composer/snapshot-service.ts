/** Snapshots of volumes. A name is `VOLUME@SNAPSHOT`; ids are taken wherever a name is. */
import { AtollError, checkName, parseSnapshotName, type ResourceRow } from '@atoll/core'
import type { DiffRange } from '@atoll/mapper'
import type { ProjectScope } from './resolve.ts'
import { pageOfResources, type Page, type PageOptions } from './resource-pages.ts'
import {
  nameKey,
  requireFreeName,
  requireUnused,
  reread,
  viewOfOne,
  viewSources,
  withPoolsRead,
  withUsage,
  type NamePolicy,
  type ServiceContext,
} from './service-context.ts'
import { resourceView, snapshotStatus, type PoolsRead, type ResourceUsage, type SnapshotView } from './views.ts'

/** Volumes that one call takes a snapshot of at one point in time. */
export const snapshotGroupMax = 256

export interface CreatedSnapshots {
  snapshots: SnapshotView[]
  /** How long requests of clients were held up. */
  pauseMs: number
}

export class SnapshotService {
  private readonly context: ServiceContext

  constructor(context: ServiceContext) {
    this.context = context
  }

  /**
   * Takes snapshots of several volumes at one point in time; all of them are made, or none.
   * @param names each `VOLUME@SNAPSHOT`
   * @throws AtollError NAME_INVALID, NAME_TAKEN, SNAPSHOT_BUSY, ARGUMENT_INVALID, VOLUME_NOT_FOUND, NAME_AMBIGUOUS
   */
  async create(
    names: readonly string[],
    options: ProjectScope & NamePolicy & { deadlineMs?: number } = {},
  ): Promise<CreatedSnapshots> {
    const { catalog, mapper, resolver, locks } = this.context
    if (names.length === 0 || names.length > snapshotGroupMax) {
      throw new AtollError('ARGUMENT_INVALID', `${names.length} snapshots at once; 1 to ${snapshotGroupMax} are possible`, {
        values: { limit: snapshotGroupMax },
      })
    }
    const items: { volume: ResourceRow; name: string }[] = []
    for (const text of names) {
      const parts = parseSnapshotName(text)
      checkName('snapshot', parts.snapshot)
      const volume = await resolver.resource('volume', parts.volume, options)
      if (items.some((item) => item.volume.id === volume.id)) {
        throw new AtollError('ARGUMENT_INVALID', `volume ${volume.name} is named twice: one snapshot of it at a time`, {
          values: { volume: volume.name },
        })
      }
      items.push({ volume, name: parts.snapshot })
    }
    const { rows, pauseMs } = await locks.runAll(
      items.flatMap(({ volume, name }) => [volume.id, nameKey('snapshot', volume.id, name)]),
      async () => {
        if (options.allowDuplicateName !== true) {
          for (const { volume, name } of items) await requireFreeName(catalog, 'snapshot', volume.id, name)
        }
        return await mapper.snapshot(
          items.map(({ volume, name }) => ({ volumeId: volume.id, name })),
          options.deadlineMs === undefined ? {} : { deadlineMs: options.deadlineMs },
        )
      },
    )
    const sources = await viewSources(this.context)
    const volumeNames = new Map(items.map(({ volume }) => [volume.id, volume.name]))
    return {
      snapshots: rows.map((row) => snapshotView(row, resourceView(row, sources), volumeNames.get(row.volume_id ?? '') ?? '')),
      pauseMs,
    }
  }

  /** The snapshots of a volume, oldest first. @throws AtollError VOLUME_NOT_FOUND, NAME_AMBIGUOUS, ARGUMENT_INVALID */
  async list(volume: string, options: ProjectScope & PageOptions = {}): Promise<Page<SnapshotView>> {
    const { catalog, resolver } = this.context
    const row = await resolver.resource('volume', volume, options)
    const { entries, next } = await pageOfResources(catalog, { kind: 'snapshot', volumeId: row.id }, options)
    const sources = await viewSources(this.context)
    return { entries: entries.map((snapshot) => snapshotView(snapshot, resourceView(snapshot, sources), row.name)), next }
  }

  /** @throws AtollError SNAPSHOT_NOT_FOUND, VOLUME_NOT_FOUND, NAME_AMBIGUOUS */
  async show(snapshot: string, scope: ProjectScope = {}): Promise<SnapshotView & ResourceUsage & PoolsRead> {
    const { catalog, resolver } = this.context
    const row = await resolver.resource('snapshot', snapshot, scope)
    const volume = await reread(catalog, row.volume_id ?? row.id)
    const view = snapshotView(row, await viewOfOne(this.context, row), volume.name)
    return await withUsage(this.context, await withPoolsRead(this.context, view))
  }

  /** Deletes a snapshot; what was made from it stays. @throws AtollError SNAPSHOT_IN_USE, SNAPSHOT_NOT_FOUND, NAME_AMBIGUOUS */
  async delete(snapshot: string, scope: ProjectScope = {}): Promise<void> {
    const { catalog, mapper, resolver, locks, reclaim } = this.context
    const { id } = await resolver.resource('snapshot', snapshot, scope)
    await locks.run(id, async () => {
      requireUnused(this.context, await reread(catalog, id), 'deleted')
      await mapper.deleteResource(id)
    })
    reclaim.request()
  }

  /**
   * Makes the volume what it was when the snapshot was taken; what was written since is lost.
   * @throws AtollError VOLUME_IN_USE (attached), SNAPSHOT_NOT_FOUND, NAME_AMBIGUOUS
   */
  async rollback(snapshot: string, scope: ProjectScope = {}): Promise<void> {
    const { catalog, mapper, resolver, locks, reclaim } = this.context
    const row = await resolver.resource('snapshot', snapshot, scope)
    const volumeId = row.volume_id ?? ''
    await locks.runAll([volumeId, row.id], async () => {
      requireUnused(this.context, await reread(catalog, volumeId), 'rolled back')
      await mapper.rollback(volumeId, row.id)
    })
    reclaim.request()
  }

  /**
   * What changed from a snapshot to a later one of the same volume (by its name or `VOLUME@SNAPSHOT`), or to the volume as
   * it is now (`to` left out, or the volume).
   * @throws AtollError SNAPSHOT_MISMATCH, SNAPSHOT_NOT_FOUND, VOLUME_NOT_FOUND, NAME_AMBIGUOUS
   */
  async diff(from: string, to: string | undefined, scope: ProjectScope = {}): Promise<DiffRange[]> {
    const { mapper, resolver } = this.context
    const older = await resolver.resource('snapshot', from, scope)
    const newerId = await this.diffTarget(older, to, scope)
    return await mapper.diff(older.id, newerId)
  }

  private async diffTarget(older: ResourceRow, to: string | undefined, scope: ProjectScope): Promise<string> {
    const { resolver } = this.context
    const volumeId = older.volume_id ?? ''
    if (to === undefined) return volumeId
    const newer = to.includes('@') ? await resolver.resource('snapshot', to, scope) : await resolver.volumeOrId(to, scope)
    if (newer.id !== volumeId && newer.volume_id !== volumeId) {
      throw new AtollError('SNAPSHOT_MISMATCH', `${to} does not belong to the volume of snapshot ${older.name}`, {
        values: { from: older.id, to },
      })
    }
    return newer.id
  }
}

function snapshotView(row: ResourceRow, view: SnapshotView | Parameters<typeof snapshotStatus>[1], volume: string): SnapshotView {
  return { ...view, status: snapshotStatus(row, view), volumeId: row.volume_id ?? '', volume }
}
