/** Volumes: what the CLI, the daemon and the APIs call. Names and ids are taken alike. */
import { AtollError, checkName, checkVolumeSize, roundUp, volumeSizeUnitBytes, type ResourceRow } from '@atoll/core'
import type { AttachmentView, AttachOptions } from './attachments.ts'
import { attachableResource, type ProjectScope } from './resolve.ts'
import { pageOfResources, snapshotNames, type Page, type PageOptions } from './resource-pages.ts'
import {
  nameKey,
  requireFreeName,
  requireUnused,
  reread,
  snapshotsOf,
  viewSources,
  withPoolsRead,
  withUsage,
  type NamePolicy,
  type ServiceContext,
} from './service-context.ts'
import { resourceView, volumeStatus, type PoolsRead, type ResourceUsage, type VolumeView, type ViewSources } from './views.ts'

/** The pool of what is made without naming one. */
export const defaultPoolName = 'default'

export interface CreateVolumeOptions extends ProjectScope, NamePolicy {
  name: string
  /** May be left out with `from`: the size of the source then, rounded up. */
  sizeBytes?: number
  /** Name or id; default: the pool of the source, or `default`. */
  pool?: string
  /** `image:NAME`, `snapshot:VOLUME@SNAPSHOT`, `volume:NAME`, `file:CONTAINER/NAME` or an id. */
  from?: string
}

export class VolumeService {
  private readonly context: ServiceContext

  constructor(context: ServiceContext) {
    this.context = context
  }

  /**
   * Makes a volume; from a source it shares all bytes with it, also where that lies in another pool: then it reads from both.
   * @throws AtollError NAME_INVALID, NAME_TAKEN, SIZE_INVALID, ARGUMENT_INVALID, POOL_NOT_FOUND, what the source's kind has, RESOURCE_STATUS
   */
  async create(options: CreateVolumeOptions): Promise<VolumeView & PoolsRead> {
    const { catalog, mapper, resolver, locks } = this.context
    checkName('volume', options.name)
    const project = await resolver.project(options)
    const source = options.from === undefined ? null : await resolver.source(options.from, options)
    const sizeBytes = newVolumeSize(options.sizeBytes, source)
    const pool =
      options.pool === undefined && source !== null
        ? await resolver.pool(source.home_pool_id)
        : await resolver.pool(options.pool ?? defaultPoolName)
    const keys = options.allowDuplicateName === true ? [] : [nameKey('volume', project.id, options.name)]
    const row = await locks.runAll(keys, async () => {
      if (options.allowDuplicateName !== true) await requireFreeName(catalog, 'volume', project.id, options.name)
      return await mapper.createVolume({
        projectId: project.id,
        name: options.name,
        sizeBytes,
        poolId: pool.id,
        ...(source === null ? {} : { fromId: source.id }),
      })
    })
    return await withPoolsRead(this.context, await this.view(row))
  }

  /** The volumes of the project, oldest first. @throws AtollError ARGUMENT_INVALID */
  async list(options: ProjectScope & PageOptions = {}): Promise<Page<VolumeView>> {
    const { catalog, resolver } = this.context
    const project = await resolver.project(options)
    const { entries, next } = await pageOfResources(catalog, { kind: 'volume', projectId: project.id }, options)
    const sources = await viewSources(this.context)
    const names = await snapshotNames(
      catalog,
      entries.map((row) => row.id),
    )
    return { entries: entries.map((row) => volumeView(row, sources, names.get(row.id) ?? [])), next }
  }

  /** @throws AtollError VOLUME_NOT_FOUND, NAME_AMBIGUOUS */
  async show(volume: string, scope: ProjectScope = {}): Promise<VolumeView & ResourceUsage & PoolsRead> {
    const row = await this.context.resolver.resource('volume', volume, scope)
    return await withUsage(this.context, await withPoolsRead(this.context, await this.view(row)))
  }

  /**
   * Deletes a volume. Its space comes back with the reclaim that follows; what others made from it stays.
   * @throws AtollError VOLUME_IN_USE, VOLUME_HAS_SNAPSHOTS, SNAPSHOT_IN_USE, VOLUME_NOT_FOUND, NAME_AMBIGUOUS
   */
  async delete(volume: string, options: ProjectScope & { withSnapshots?: boolean } = {}): Promise<void> {
    const { catalog, mapper, resolver, locks, reclaim } = this.context
    const { id } = await resolver.resource('volume', volume, options)
    const snapshotIds = (await snapshotsOf(catalog, id)).map((row) => row.id)
    await locks.runAll([id, ...snapshotIds], async () => {
      const row = await reread(catalog, id)
      requireUnused(this.context, row, 'deleted')
      const snapshots = await snapshotsOf(catalog, id)
      if (snapshots.length > 0 && options.withSnapshots !== true) {
        throw new AtollError(
          'VOLUME_HAS_SNAPSHOTS',
          `volume ${row.name} has ${snapshots.length} snapshots (${snapshots
            .slice(0, 3)
            .map(({ name }) => name)
            .join(', ')}${snapshots.length > 3 ? ', …' : ''}): delete them first, or use --with-snapshots`,
          { values: { id, snapshotCount: snapshots.length } },
        )
      }
      for (const snapshot of snapshots) requireUnused(this.context, snapshot, 'deleted')
      await mapper.deleteResource(id, { withSnapshots: options.withSnapshots === true })
    })
    reclaim.request()
  }

  /** @throws AtollError NAME_INVALID, NAME_TAKEN, VOLUME_NOT_FOUND, NAME_AMBIGUOUS */
  async rename(volume: string, name: string, options: ProjectScope & NamePolicy = {}): Promise<VolumeView> {
    const { catalog, mapper, resolver, locks, attachments } = this.context
    checkName('volume', name)
    const { id, project_id: projectId, name: oldName } = await resolver.resource('volume', volume, options)
    await locks.runAll([id, nameKey('volume', projectId, name)], async () => {
      if (name === oldName) return
      if (options.allowDuplicateName !== true) await requireFreeName(catalog, 'volume', projectId, name)
      await mapper.rename(id, name)
      attachments.rename(id, name)
    })
    return await this.view(await reread(catalog, id))
  }

  /**
   * Changes the size. Growing is always possible; clients of an attached volume see the new size when they connect again.
   * @throws AtollError SIZE_INVALID, SHRINK_NEEDS_FORCE, VOLUME_IN_USE (a smaller size while attached), VOLUME_NOT_FOUND, NAME_AMBIGUOUS
   */
  async resize(volume: string, sizeBytes: number, options: ProjectScope & { force?: boolean } = {}): Promise<VolumeView> {
    const { catalog, mapper, resolver, locks, reclaim } = this.context
    checkVolumeSize(sizeBytes)
    const { id } = await resolver.resource('volume', volume, options)
    await locks.run(id, async () => {
      const row = await reread(catalog, id)
      if (sizeBytes === row.size_bytes) return
      if (sizeBytes < row.size_bytes) {
        if (options.force !== true) {
          throw new AtollError(
            'SHRINK_NEEDS_FORCE',
            `${sizeBytes} bytes is less than the ${row.size_bytes} bytes that volume ${row.name} has: what lies beyond would be lost; use --force if that is wanted`,
            { values: { id, sizeBytes, currentBytes: row.size_bytes } },
          )
        }
        requireUnused(this.context, row, 'made smaller')
      }
      await mapper.resize(id, sizeBytes)
      if (sizeBytes < row.size_bytes) reclaim.request()
    })
    return await this.view(await reread(catalog, id))
  }

  /**
   * Makes the volume reachable, or a snapshot (`VOLUME@SNAPSHOT`) or image (`image:NAME`) for reading. With the same options
   * as before nothing changes and the same URI comes back. `takeOver`: whoever else has the pool of the volume is shut out of it,
   * and with that of everything in it.
   * @throws AtollError VOLUME_IN_USE, SNAPSHOT_IN_USE, IMAGE_IN_USE, RESOURCE_STATUS, ARGUMENT_INVALID, POOL_LOCKED naming the holder,
   * TAKE_OVER_REFUSED, what opening throws
   */
  async attach(volume: string, options: ProjectScope & AttachOptions & { takeOver?: boolean } = {}): Promise<AttachmentView> {
    const { catalog, locks, attachments, mapper, resolver } = this.context
    const { id } = await attachableResource(resolver, volume, options)
    return await locks.run(id, async () => {
      const row = await reread(catalog, id)
      // It would have to stay when its name is given other content.
      if (row.kind === 'file') {
        throw new AtollError('ARGUMENT_INVALID', `a file is not attached: make a volume of it with --from ${id}`, {
          values: { id },
        })
      }
      if (row.status !== 'available') {
        throw new AtollError('RESOURCE_STATUS', `${row.kind} ${row.name} is ${row.status} and cannot be attached`, {
          values: { id, status: row.status },
        })
      }
      await mapper.pools.openFor(row, { takeOver: options.takeOver ?? false })
      return await attachments.attach(row, options)
    })
  }

  /**
   * Ends the attachments: requests in flight are finished, clients disconnected, everything made durable.
   * @throws AtollError NOT_ATTACHED, NO_SPACE (what clients wrote cannot be stored: it stays attached), VOLUME_NOT_FOUND, NAME_AMBIGUOUS
   */
  async detach(volume: string, scope: ProjectScope = {}): Promise<void> {
    const { catalog, locks, attachments, resolver } = this.context
    const { id } = await attachableResource(resolver, volume, scope)
    await locks.run(id, async () => attachments.detach(await reread(catalog, id)))
  }

  private async view(row: ResourceRow): Promise<VolumeView> {
    const names = await snapshotNames(this.context.catalog, [row.id])
    return volumeView(row, await viewSources(this.context), names.get(row.id) ?? [])
  }
}

function volumeView(row: ResourceRow, sources: ViewSources, snapshots: string[]): VolumeView {
  const view = resourceView(row, sources)
  const move = sources.moves.get(row.id) ?? sources.moves.get(row.home_pool_id) ?? null
  return { ...view, status: volumeStatus(row, view), move, snapshots }
}

function newVolumeSize(wantedBytes: number | undefined, source: ResourceRow | null): number {
  if (source === null) {
    if (wantedBytes === undefined)
      throw new AtollError('ARGUMENT_INVALID', 'a volume without a source needs a size', { values: { argument: 'size' } })
    checkVolumeSize(wantedBytes)
    return wantedBytes
  }
  // A file may be empty, a volume not.
  const sourceBytes = Math.max(roundUp(source.size_bytes, volumeSizeUnitBytes), volumeSizeUnitBytes)
  if (wantedBytes === undefined) return sourceBytes
  checkVolumeSize(wantedBytes)
  if (wantedBytes < sourceBytes) {
    throw new AtollError(
      'SIZE_INVALID',
      `${wantedBytes} bytes is less than ${source.kind} ${source.name} has: at least ${sourceBytes} bytes are needed`,
      {
        values: { sizeBytes: wantedBytes, minBytes: sourceBytes },
      },
    )
  }
  return wantedBytes
}
