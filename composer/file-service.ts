/**
 * Files in containers: put, read, list, delete. A file is named CONTAINER/NAME; its id is accepted in place of that and is
 * also the id of its version.
 *
 * Rules:
 * - A put is seen when it is whole, and then at once and durably; one that is interrupted leaves nothing, not even a
 *   container. Puts of one name may run at the same time: the last that ends is what is there.
 * - A read sees one version to its end, whatever is put or deleted meanwhile.
 * - What was not finished when the daemon ended is removed at the next start.
 */
import { createHash } from 'node:crypto'
import {
  assert,
  AtollError,
  checkContainerName,
  checkContentType,
  checkFileName,
  checkMetadata,
  contentTypeDefault,
  isAtollError,
  isId,
  parseFilePath,
  toAtollError,
  volumeSizeMaxBytes,
  type CatalogTransaction,
  type Clock,
  type NewId,
  type ProjectRow,
  type ResourceRow,
} from '@atoll/core'
import { isMapUnreadable, type FileRows, type FileTarget } from '@atoll/mapper'
import { ByteStream } from './byte-stream.ts'
import { listFiles, type Listing, type ListingOptions } from './file-listing.ts'
import { FileReader } from './file-reader.ts'
import {
  containerNotFound,
  fileKey,
  fileNotFound,
  findCurrent,
  findContainer,
  insertContainer,
  placeFile,
  requireContainer,
  requireFile,
  resourceName,
  retire,
  selectContainers,
  selectFiles,
  type CountedContainer,
  type FilePlace,
  type FoundFile,
} from './file-rows.ts'
import { DeviceSink } from './import-sink.ts'
import type { ProjectScope } from './resolve.ts'
import type { ServiceContext } from './service-context.ts'
import { Slots } from './slots.ts'
import type { ResourceUsage } from './views.ts'
import { defaultPoolName } from './volume-service.ts'

/** Puts that run at the same time; others wait. */
const putParallelMax = 64
const putWaitersMax = 1000
/** Reads that are open at the same time. */
export const readersMax = 256
/** A name may be given another file between the moment it is looked up and the moment that file is opened. */
const openTriesMax = 8

export interface ContainerView {
  id: string
  projectId: string
  name: string
  /** Puts and deletes keep what was there before. */
  versioned: boolean
  metadata: Record<string, string>
  /** Without old versions. */
  fileCount: number
  sizeBytes: number
  createdAt: number
  updatedAt: number
}

export interface FileView {
  /** Also the id of the version. */
  id: string
  projectId: string
  container: string
  name: string
  sizeBytes: number
  /** MD5 in hexadecimal digits; null: not known, because it was made without reading it. */
  etag: string | null
  contentType: string
  metadata: Record<string, string>
  /** Whether it is what the name means now. */
  current: boolean
  /** Whether it stands for a delete: such a version has no content. */
  deleteMarker: boolean
  /** Name of the pool that it lies in. */
  pool: string
  poolId: string
  createdAt: number
  updatedAt: number
}

export interface FileListing {
  entries: (FileView | { commonPrefix: string })[]
  next: Listing['next']
}

/** A file by its name and, if it is not the current one, its version. */
export interface FileRef extends ProjectScope {
  /** CONTAINER/NAME, or an id. */
  path: string
  /** Id of a version. */
  version?: string
}

export interface PlaceOptions extends ProjectScope {
  container: string
  name: string
  /** Default: `application/octet-stream`, or the source's. */
  contentType?: string
  /** Default: none, or the source's. */
  metadata?: Record<string, string>
  /** Default false. True: refused if there is such a file. */
  onlyIfNew?: boolean
}

export interface PutOptions extends PlaceOptions {
  stream: AsyncIterable<Uint8Array>
  /** If it is known: content of another length is refused. */
  sizeBytes?: number
  /** If it is known: content with another MD5 is refused. */
  etag?: string
  /** Name or id; default: `default`. */
  pool?: string
}

export interface ReadOptions {
  /** Default 0. */
  offsetBytes?: number
  /** Default: to the end. A range that begins in the file and ends behind it is cut. */
  lengthBytes?: number
  /** Only if the file has this MD5. */
  etag?: string
}

/** A read that is under way. */
export interface Reading {
  /** Of all of it. */
  readonly sizeBytes: number
  readonly offsetBytes: number
  readonly lengthBytes: number
  /** null: it is no file, but read as one. */
  readonly file: FileView | null
  /** Read it to the end, or close it. */
  readonly content: FileReader
}

export class FileService {
  private readonly context: ServiceContext
  private readonly clock: Clock
  private readonly newId: NewId
  private readonly puts = new Slots(putParallelMax, putWaitersMax)
  private readonly stopping = new AbortController()
  private readonly running = new Set<Promise<unknown>>()
  private readonly readers = new Set<FileReader>()
  private openingReaders = 0

  constructor(context: ServiceContext, options: { clock: Clock; newId: NewId }) {
    this.context = context
    this.clock = options.clock
    this.newId = options.newId
  }

  /** Removes what an earlier process has not finished; what cannot be removed is logged. Before anything is put. */
  async removeUnfinished(): Promise<void> {
    const { catalog, mapper, log, reclaim } = this.context
    const rows = await catalog.db
      .selectFrom('resources')
      .leftJoin('files', 'files.id', 'resources.id')
      .select(['resources.id', 'resources.name', 'resources.status', 'files.container_id'])
      .where('resources.kind', '=', 'file')
      .where((or) => or.or([or('resources.status', '!=', 'available'), or('files.id', 'is', null)]))
      .execute()
    for (const { id, name, status, container_id: containerId } of rows) {
      if (containerId !== null) {
        // It gets its place in the transaction that finishes it, and loses it in the one that deletes it.
        log.error(
          { fileId: id, name, status },
          'a file is recorded as unfinished or deleted, and lies in a container: it is kept',
        )
        continue
      }
      try {
        await mapper.deleteResource(id)
        log.info({ fileId: id, name }, 'a file that was not finished, or was to be deleted, was removed')
      } catch (error) {
        log.error({ err: error, fileId: id, name }, 'a file that was not finished could not be removed')
      }
    }
    if (rows.length > 0) reclaim.request()
  }

  /** Ends what is under way, without results; returns when nothing is any more. Idempotent. */
  async close(): Promise<void> {
    const error = new AtollError('DAEMON_STOPPING', 'the daemon is being stopped: try again when it is back')
    this.stopping.abort(error)
    await Promise.allSettled(Array.from(this.readers, async (reader) => await reader.abort(error)))
    while (this.running.size > 0) await Promise.allSettled(this.running)
  }

  /**
   * Stores what a stream brings under a name; returns when that is durable.
   * @throws AtollError NAME_INVALID, METADATA_INVALID, NAME_TAKEN, SIZE_INVALID, FILE_STREAM_LOST, ETAG_MISMATCH, POOL_NOT_FOUND, LIMIT_REACHED,
   *   DAEMON_STOPPING, NO_SPACE, IO_ERROR; nothing was changed then
   */
  async put(options: PutOptions): Promise<FileView> {
    const { resolver } = this.context
    const stream = new ByteStream(options.stream, { code: 'FILE_STREAM_LOST', what: 'content' })
    try {
      checkPlace(options)
      if (options.sizeBytes !== undefined) checkFileSize(options.sizeBytes)
      const project = await resolver.project(options)
      const pool = await resolver.pool(options.pool ?? defaultPoolName)
      const found = await this.track(
        async () => await this.puts.run(async () => await this.receive(stream, options, project, pool.id)),
      )
      return await this.fileView(found, options.container)
    } finally {
      stream.end()
    }
  }

  /**
   * Makes a file that shares the content of a volume as it is now, a snapshot, an image or another file; nothing is copied.
   * @param from `volume:NAME`, `snapshot:VOLUME@SNAPSHOT`, `image:NAME`, `file:CONTAINER/NAME` or an id
   * @throws AtollError NAME_INVALID, METADATA_INVALID, NAME_TAKEN, RESOURCE_STATUS, and what the source's kind has
   */
  async putFrom(options: PlaceOptions & { from: string }): Promise<FileView> {
    const { catalog, mapper, resolver } = this.context
    checkPlace(options)
    const project = await resolver.project(options)
    const source = await resolver.source(options.from, options)
    const sourceFile =
      source.kind === 'file' ? await selectFiles(catalog.db).where('files.id', '=', source.id).executeTakeFirst() : undefined
    if (source.kind === 'file' && (sourceFile === undefined || sourceFile.delete_marker)) {
      throw new AtollError('FILE_NOT_FOUND', `${options.from} is not a file any more`, { values: { id: source.id } })
    }
    const place: FilePlace = {
      projectId: project.id,
      container: options.container,
      name: options.name,
      etag: sourceFile?.etag ?? null,
      contentType: options.contentType ?? sourceFile?.content_type ?? contentTypeDefault,
      metadata: options.metadata ?? sourceFile?.metadata ?? {},
      onlyIfNew: options.onlyIfNew ?? false,
      deleteMarker: false,
    }
    const wanted = { projectId: project.id, name: resourceName(place.name), poolId: source.home_pool_id }
    const found = await this.track(
      async () =>
        await this.placing(place, async (rows) => {
          await mapper.createFile(wanted, source.id, rows)
        }),
    )
    return await this.fileView(found, options.container)
  }

  /**
   * Begins to read a file, or a range of it.
   * @throws AtollError FILE_NOT_FOUND, CONTAINER_NOT_FOUND, RANGE_INVALID, ETAG_MISMATCH, LIMIT_REACHED, and what opening it throws
   */
  async read(ref: FileRef, options: ReadOptions = {}): Promise<Reading> {
    return await this.opening(async () => {
      for (let tries = 1; ; tries += 1) {
        const { found, container } = await this.find(ref)
        if (found.delete_marker) throw fileNotFound(container, found.name, ref.version)
        if (options.etag !== undefined && options.etag !== found.etag) {
          throw etagMismatch(found.etag, options.etag)
        }
        const range = rangeOf(found.size_bytes, options)
        try {
          const content = await this.openReader({ id: found.id, kind: 'file' }, range)
          return { sizeBytes: found.size_bytes, ...range, file: await this.fileView(found, container), content }
        } catch (error) {
          const isGone = isAtollError(error, 'RESOURCE_NOT_FOUND') || isAtollError(error, 'RESOURCE_STATUS')
          if (!isGone || tries === openTriesMax) throw error
          // Another put was quicker: what the name means now is wanted.
        }
      }
    })
  }

  /**
   * Begins to read something else as if it were a file: an image, a snapshot, or a volume as it is at this moment.
   * @param source `volume:NAME`, `snapshot:VOLUME@SNAPSHOT` or `image:NAME`
   * @throws AtollError RANGE_INVALID, LIMIT_REACHED, what the source's kind has, and what opening it throws
   */
  async readSource(source: string, scope: ProjectScope, options: ReadOptions = {}): Promise<Reading> {
    const { mapper, resolver } = this.context
    return await this.opening(async () => {
      const row = await resolver.source(source, scope)
      if (row.kind !== 'volume') {
        requireAvailable(row)
        const range = rangeOf(row.size_bytes, options)
        return { sizeBytes: row.size_bytes, ...range, file: null, content: await this.openReader(row, range) }
      }
      // Its content is shared for as long as it is read: without a name, so that a crash leaves nothing.
      const wanted = { projectId: row.project_id, name: row.name, poolId: row.home_pool_id }
      const moment = await mapper.createFile(wanted, row.id, { mayDrop: [], write: async () => undefined })
      const drop = async (): Promise<void> => await this.removeMoment(moment.id)
      try {
        const range = rangeOf(moment.size_bytes, options)
        return { sizeBytes: moment.size_bytes, ...range, file: null, content: await this.openReader(moment, range, drop) }
      } catch (error) {
        await drop()
        throw error
      }
    })
  }

  /** @throws AtollError FILE_NOT_FOUND, CONTAINER_NOT_FOUND */
  async show(ref: FileRef): Promise<FileView & ResourceUsage> {
    const { found, container } = await this.find(ref)
    const view = await this.fileView(found, container)
    try {
      return { ...view, ...(await this.context.mapper.usage(found.id)) }
    } catch (error) {
      if (!isMapUnreadable(error)) throw error
      return { ...view, usedBytes: null, sharedBytes: null }
    }
  }

  /** What is in a container. @throws AtollError CONTAINER_NOT_FOUND, ARGUMENT_INVALID */
  async list(container: string, options: ProjectScope & ListingOptions = {}): Promise<FileListing> {
    const { catalog, resolver } = this.context
    const project = await resolver.project(options)
    const { id } = await requireContainer(catalog.db, project.id, container)
    const { entries, next } = await listFiles(catalog, id, options)
    const pools = await this.poolNames()
    return { entries: entries.map((entry) => ('file' in entry ? viewOf(entry.file, container, pools) : entry)), next }
  }

  /**
   * Deletes a file, or one version of it. Without a version, a versioned container keeps the content and notes the delete.
   * @throws AtollError FILE_NOT_FOUND, CONTAINER_NOT_FOUND
   */
  async delete(ref: FileRef): Promise<void> {
    const { locks, reclaim } = this.context
    const { found, container } = await this.find(ref)
    const isVersion = ref.version !== undefined || isId(ref.path.toLowerCase())
    await this.track(async () => {
      await locks.run(fileKey(found.project_id, container, found.name), async () => {
        if (isVersion) await this.deleteVersion(found, container)
        else await this.deleteCurrent(found.project_id, container, found.name)
      })
    })
    reclaim.request()
  }

  /**
   * Changes what is said about a file that is there. What is given replaces what was said before: all of the metadata, too.
   * @throws AtollError FILE_NOT_FOUND, CONTAINER_NOT_FOUND, METADATA_INVALID; ARGUMENT_INVALID for an old version
   */
  async set(
    ref: ProjectScope & { path: string },
    { metadata, contentType }: { metadata?: Record<string, string>; contentType?: string },
  ): Promise<FileView> {
    const { catalog, locks } = this.context
    if (metadata !== undefined) checkMetadata(metadata)
    if (contentType !== undefined) checkContentType(contentType)
    const { found, container } = await this.find(ref)
    return await locks.run(fileKey(found.project_id, container, found.name), async () => {
      const changed = await catalog.write(async (tx) => {
        const parent = await requireContainer(tx, found.project_id, container)
        const file = await requireFile(tx, parent, found.name, isId(ref.path.toLowerCase()) ? found.id : undefined)
        if (!file.is_current) {
          throw new AtollError('ARGUMENT_INVALID', `${file.id} is an old version, which stays as it is`, {
            values: { id: file.id },
          })
        }
        await tx
          .updateTable('files')
          .set({
            metadata: metadata ?? file.metadata,
            content_type: contentType ?? file.content_type,
          })
          .where('id', '=', file.id)
          .execute()
        await tx.updateTable('resources').set({ updated_at: this.clock.nowMs() }).where('id', '=', file.id).execute()
        return await requireFile(tx, parent, found.name, file.id)
      })
      return await this.fileView(changed, container)
    })
  }

  /** Makes a container; one that is there already stays as it is and is returned. @throws AtollError NAME_INVALID, METADATA_INVALID */
  async createContainer(
    name: string,
    options: ProjectScope & { versioned?: boolean; metadata?: Record<string, string> } = {},
  ): Promise<{ container: ContainerView; created: boolean }> {
    const { catalog, resolver } = this.context
    checkContainerName(name)
    checkMetadata(options.metadata ?? {})
    const project = await resolver.project(options)
    const { versioned = false, metadata = {} } = options
    return await catalog.write(async (tx) => {
      const found = await findContainer(tx, project.id, name)
      const sources = { nowMs: this.clock.nowMs(), newId: this.newId }
      if (found === undefined) await insertContainer(tx, { project_id: project.id, name, versioned, metadata }, sources)
      return { container: await containerView(tx, project.id, name), created: found === undefined }
    })
  }

  /**
   * Changes what is given. Metadata is changed item by item, as in Swift: an item with an empty value goes, and what is not named
   * stays.
   * @throws AtollError CONTAINER_NOT_FOUND, METADATA_INVALID
   */
  async setContainer(
    name: string,
    options: ProjectScope & { versioned?: boolean; metadata?: Record<string, string> },
  ): Promise<ContainerView> {
    const { catalog, resolver } = this.context
    const project = await resolver.project(options)
    return await catalog.write(async (tx) => {
      const row = await requireContainer(tx, project.id, name)
      const items = Object.entries({ ...row.metadata, ...options.metadata }).filter(([, value]) => value !== '')
      const metadata = Object.fromEntries(items)
      checkMetadata({ ...options.metadata, ...metadata })
      const { versioned = row.versioned } = options
      await tx
        .updateTable('containers')
        .set({ updated_at: this.clock.nowMs(), versioned, metadata })
        .where('id', '=', row.id)
        .execute()
      return await containerView(tx, project.id, name)
    })
  }

  /** Deletes a container in which nothing is, also no old version. @throws AtollError CONTAINER_NOT_FOUND, CONTAINER_NOT_EMPTY */
  async deleteContainer(name: string, scope: ProjectScope = {}): Promise<void> {
    const { catalog, resolver } = this.context
    const project = await resolver.project(scope)
    await catalog.write(
      async (tx) => {
        const { id } = await requireContainer(tx, project.id, name)
        const file = await tx
          .selectFrom('files')
          .select(['name', 'is_current'])
          .where('container_id', '=', id)
          .orderBy('is_current', 'desc')
          .limit(1)
          .executeTakeFirst()
        if (file !== undefined) {
          const what = file.is_current ? 'has files' : 'has old versions of files (see `atoll file list --versions`)'
          throw new AtollError('CONTAINER_NOT_EMPTY', `container ${JSON.stringify(name)} ${what}: delete them first`, {
            values: { container: name, file: file.name },
          })
        }
        await tx.deleteFrom('containers').where('id', '=', id).execute()
      },
      { emergency: true },
    )
  }

  /** @throws AtollError CONTAINER_NOT_FOUND */
  async showContainer(name: string, scope: ProjectScope = {}): Promise<ContainerView> {
    const { catalog, resolver } = this.context
    const project = await resolver.project(scope)
    return await containerView(catalog.db, project.id, name)
  }

  /** The containers of the project, by name. */
  async listContainers(scope: ProjectScope = {}): Promise<ContainerView[]> {
    const { catalog, resolver } = this.context
    const project = await resolver.project(scope)
    const rows = await selectContainers(catalog.db)
      .where('containers.project_id', '=', project.id)
      .orderBy('containers.name')
      .execute()
    return rows.map(viewOfContainer)
  }

  /** What is under way, so that `close` can wait for it. */
  private async track<T>(fn: () => Promise<T>): Promise<T> {
    this.stopping.signal.throwIfAborted()
    const run = fn()
    this.running.add(run)
    try {
      return await run
    } finally {
      this.running.delete(run)
    }
  }

  private async receive(stream: ByteStream, options: PutOptions, project: ProjectRow, poolId: string): Promise<FoundFile> {
    const { mapper, reclaim } = this.context
    const wanted = { projectId: project.id, name: resourceName(options.name), poolId }
    const hash = createHash('md5')
    // Nothing is made before the first byte is there.
    const { signal } = this.stopping
    let chunk = await stream.next(signal)
    const target: FileTarget | null = chunk === null ? null : await mapper.beginFile(wanted)
    try {
      let sizeBytes = 0
      if (target !== null) {
        const limitBytes = options.sizeBytes ?? volumeSizeMaxBytes
        const sink = new DeviceSink(target.device)
        for (; chunk !== null; chunk = await stream.next(signal)) {
          if (sink.takenBytes + chunk.length > limitBytes) throw tooLong(limitBytes)
          hash.update(chunk)
          await sink.write(chunk)
        }
        await sink.end()
        sizeBytes = sink.takenBytes
      }
      if (options.sizeBytes !== undefined && sizeBytes !== options.sizeBytes) {
        throw new AtollError('FILE_STREAM_LOST', `the content ended after ${sizeBytes} of ${options.sizeBytes} bytes`, {
          values: { sizeBytes: options.sizeBytes, receivedBytes: sizeBytes },
        })
      }
      const etag = hash.digest('hex')
      if (options.etag !== undefined && options.etag.toLowerCase() !== etag) throw etagMismatch(etag, options.etag)
      const place: FilePlace = {
        projectId: project.id,
        container: options.container,
        name: options.name,
        etag,
        contentType: options.contentType ?? contentTypeDefault,
        metadata: options.metadata ?? {},
        onlyIfNew: options.onlyIfNew ?? false,
        deleteMarker: false,
      }
      return await this.placing(place, async (rows) => {
        if (target === null) await mapper.createFile(wanted, null, rows)
        else await mapper.finishFile(target, sizeBytes, rows)
      })
    } catch (error) {
      if (target !== null) {
        await mapper.abortFile(target)
        reclaim.request()
      }
      throw error
    }
  }

  /** Makes a file current under the lock of its name. */
  private async placing(place: FilePlace, make: (rows: FileRows) => Promise<void>): Promise<FoundFile> {
    const { catalog, locks, reclaim } = this.context
    return await locks.run(fileKey(place.projectId, place.container, place.name), async () => {
      const container = await findContainer(catalog.db, place.projectId, place.container)
      const current = container === undefined ? undefined : await findCurrent(catalog.db, container.id, place.name)
      let placed: FoundFile | undefined
      await make({
        mayDrop: current === undefined ? [] : [current.id],
        write: async (tx, file, drop) => {
          const sources = { nowMs: this.clock.nowMs(), newId: this.newId }
          placed = await placeFile(tx, place, file, drop, sources)
        },
      })
      assert(placed !== undefined, 'a file was not placed')
      if (current !== undefined) reclaim.request()
      return placed
    })
  }

  private async deleteCurrent(projectId: string, containerName: string, name: string): Promise<void> {
    const { catalog, mapper } = this.context
    const container = await requireContainer(catalog.db, projectId, containerName)
    const current = await requireFile(catalog.db, container, name, undefined)
    if (!container.versioned) {
      await mapper.dropFiles([current.id], async (tx, drop) => await retire(tx, container, current, drop))
      return
    }
    const marker: FilePlace = {
      projectId,
      container: containerName,
      name,
      etag: null,
      contentType: contentTypeDefault,
      metadata: {},
      onlyIfNew: false,
      deleteMarker: true,
    }
    const wanted = { projectId, name: resourceName(name), poolId: current.home_pool_id }
    const sources = { nowMs: this.clock.nowMs(), newId: this.newId }
    await mapper.createFile(wanted, null, {
      mayDrop: [current.id],
      write: async (tx, file, drop) => void (await placeFile(tx, marker, file, drop, sources)),
    })
  }

  private async deleteVersion(found: FoundFile, container: string): Promise<void> {
    await this.context.mapper.dropFiles([found.id], async (tx, drop) => {
      const present = await tx.selectFrom('files').select('id').where('id', '=', found.id).executeTakeFirst()
      if (present === undefined) throw fileNotFound(container, found.name, found.id)
      await drop(found.id)
    })
  }

  /** @throws AtollError FILE_NOT_FOUND, CONTAINER_NOT_FOUND, NAME_INVALID */
  private async find({ path, version, ...scope }: FileRef): Promise<{ found: FoundFile; container: string }> {
    const { catalog, resolver } = this.context
    const project = await resolver.project(scope)
    if (isId(path.toLowerCase())) {
      const found = await selectFiles(catalog.db)
        .where('files.id', '=', path.toLowerCase())
        .where('files.project_id', '=', project.id)
        .executeTakeFirst()
      if (found === undefined) throw new AtollError('FILE_NOT_FOUND', `there is no file ${path}`, { values: { id: path } })
      const container = await catalog.db
        .selectFrom('containers')
        .select('name')
        .where('id', '=', found.container_id)
        .executeTakeFirstOrThrow()
      return { found, container: container.name }
    }
    const names = parseFilePath(path)
    const container = await requireContainer(catalog.db, project.id, names.container)
    return { found: await requireFile(catalog.db, container, names.name, version), container: container.name }
  }

  private async opening(open: () => Promise<Reading>): Promise<Reading> {
    if (this.readers.size + this.openingReaders >= readersMax) {
      throw new AtollError('LIMIT_REACHED', `${readersMax} files are being read already`, { values: { limit: readersMax } })
    }
    this.openingReaders += 1
    try {
      return await this.track(open)
    } finally {
      this.openingReaders -= 1
    }
  }

  private async openReader(
    resource: Pick<ResourceRow, 'id' | 'kind'>,
    range: { offsetBytes: number; lengthBytes: number },
    afterwards: () => Promise<void> = async () => undefined,
  ): Promise<FileReader> {
    if (range.lengthBytes === 0) {
      await afterwards()
      return new FileReader(null, range)
    }
    const hold = await this.context.devices.acquire(resource)
    const reader = new FileReader(hold.device, range, async () => {
      this.readers.delete(reader)
      try {
        await hold.release()
      } finally {
        if (resource.kind === 'file') await this.removeIfDeleting(resource.id)
        await afterwards()
      }
    })
    this.readers.add(reader)
    // `close` has looked at the readers already.
    if (this.stopping.signal.aborted) await reader.abort(this.stopping.signal.reason)
    return reader
  }

  /** A file that was replaced or deleted while it was read goes with its last reader. */
  private async removeIfDeleting(id: string): Promise<void> {
    const { catalog, mapper, reclaim, log } = this.context
    try {
      const row = await catalog.db
        .selectFrom('resources')
        .select('id')
        .where('id', '=', id)
        .where('kind', '=', 'file')
        .where('status', '=', 'deleting')
        .executeTakeFirst()
      if (row === undefined || mapper.isOpen(id)) return
      await mapper.deleteResource(id)
      reclaim.request()
    } catch (error) {
      // Somebody else reads it, or has removed it.
      if (isAtollError(error, 'FILE_IN_USE') || isAtollError(error, 'RESOURCE_NOT_FOUND')) return
      log.warn({ err: toAtollError(error), fileId: id }, 'a file that was to be deleted is removed at the next start')
    }
  }

  private async removeMoment(id: string): Promise<void> {
    const { mapper, reclaim, log } = this.context
    try {
      await mapper.deleteResource(id)
      reclaim.request()
    } catch (error) {
      log.warn({ err: toAtollError(error), resourceId: id }, 'what a volume was at a moment is removed at the next start')
    }
  }

  private async fileView(found: FoundFile, container: string): Promise<FileView> {
    return viewOf(found, container, await this.poolNames())
  }

  private async poolNames(): Promise<ReadonlyMap<string, string>> {
    const pools = await this.context.catalog.db.selectFrom('pools').select(['id', 'name']).execute()
    return new Map(pools.map(({ id, name }) => [id, name]))
  }
}

/** @throws AtollError CONTAINER_NOT_FOUND */
async function containerView(tx: CatalogTransaction, projectId: string, name: string): Promise<ContainerView> {
  const row = await selectContainers(tx)
    .where('containers.project_id', '=', projectId)
    .where('containers.name', '=', name)
    .executeTakeFirst()
  if (row === undefined) throw containerNotFound(name)
  return viewOfContainer(row)
}

function viewOfContainer({ size_high, size_low, ...row }: CountedContainer): ContainerView {
  return {
    id: row.id,
    projectId: row.project_id,
    name: row.name,
    versioned: row.versioned,
    metadata: row.metadata,
    fileCount: row.file_count,
    sizeBytes: size_high * 2 ** 32 + size_low,
    createdAt: row.created_at,
    updatedAt: row.updated_at,
  }
}

function viewOf(found: FoundFile, container: string, pools: ReadonlyMap<string, string>): FileView {
  return {
    id: found.id,
    projectId: found.project_id,
    container,
    name: found.name,
    sizeBytes: found.size_bytes,
    etag: found.etag,
    contentType: found.content_type,
    metadata: found.metadata,
    current: found.is_current,
    deleteMarker: found.delete_marker,
    pool: pools.get(found.home_pool_id) ?? found.home_pool_id,
    poolId: found.home_pool_id,
    createdAt: found.created_at,
    updatedAt: found.updated_at,
  }
}

function checkPlace(options: PlaceOptions): void {
  checkContainerName(options.container)
  checkFileName(options.name)
  checkMetadata(options.metadata ?? {})
  if (options.contentType !== undefined) checkContentType(options.contentType)
}

function checkFileSize(sizeBytes: number): void {
  if (Number.isSafeInteger(sizeBytes) && sizeBytes >= 0 && sizeBytes <= volumeSizeMaxBytes) return
  throw new AtollError(
    'SIZE_INVALID',
    `a file of ${sizeBytes} bytes is out of range: 0 to ${volumeSizeMaxBytes} bytes (512 TiB)`,
    {
      values: { sizeBytes, minBytes: 0, maxBytes: volumeSizeMaxBytes },
    },
  )
}

/** @throws AtollError RANGE_INVALID, ARGUMENT_INVALID */
function rangeOf(sizeBytes: number, options: ReadOptions): { offsetBytes: number; lengthBytes: number } {
  const { offsetBytes = 0, lengthBytes = sizeBytes } = options
  for (const [argument, value] of Object.entries({ offset: offsetBytes, length: lengthBytes })) {
    if (Number.isSafeInteger(value) && value >= 0) continue
    throw new AtollError('ARGUMENT_INVALID', `the ${argument} ${value} is no number of bytes`, { values: { argument, value } })
  }
  if (offsetBytes > sizeBytes) {
    throw new AtollError('RANGE_INVALID', `offset ${offsetBytes} is behind the end: there are ${sizeBytes} bytes`, {
      values: { offsetBytes, sizeBytes },
    })
  }
  return { offsetBytes, lengthBytes: Math.min(lengthBytes, sizeBytes - offsetBytes) }
}

function requireAvailable(row: ResourceRow): void {
  if (row.status === 'available') return
  throw new AtollError('RESOURCE_STATUS', `${row.kind} ${row.name} is ${row.status} and cannot be read`, {
    values: { id: row.id, status: row.status },
  })
}

function tooLong(limitBytes: number): AtollError {
  return new AtollError('SIZE_INVALID', `the content has more than ${limitBytes} bytes`, { values: { limitBytes } })
}

function etagMismatch(found: string | null, wanted: string): AtollError {
  return new AtollError('ETAG_MISMATCH', `the MD5 of the content is ${found ?? 'not known'}, not ${wanted}`, {
    values: { etag: found, wanted },
  })
}
