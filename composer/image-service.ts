/** Images: imports and exports (as jobs), and everything else about them. Names and ids are taken alike. */
import {
  AtollError,
  checkName,
  isAtollError,
  type JsonObject,
  type PoolRow,
  type ProjectRow,
  type ResourceRow,
} from '@atoll/core'
import { requireQemuImg } from './convert-sandbox.ts'
import { checkDestination } from './image-destination.ts'
import type { ImageFormat } from './image-format.ts'
import { planImage, type ImagePlan } from './image-inspect.ts'
import { checkImageSize } from './image-size.ts'
import { ImageSource } from './image-source.ts'
import { parseHttpUrl } from './import-http-fetch.ts'
import { SecretUrls } from './import-http.ts'
import { inspectNbd } from './import-nbd.ts'
import { ImageStream, type ImportStreams } from './import-stream.ts'
import type { ImportTargets } from './import-targets.ts'
import type { JobView } from './job-kind.ts'
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
import { imageStatus, resourceView, type ImageView, type PoolsRead, type ResourceUsage } from './views.ts'
import type { SetTimer } from './timers.ts'
import { defaultPoolName } from './volume-service.ts'

/**
 * How long a request waits for the inspection of a file. That of an honest image takes less; a file can be made so that it takes
 * a hundred times as long, and nobody must wait for that.
 */
export const inspectLimitMsDefault = 5000

export interface ImportOptions extends ProjectScope, NamePolicy {
  name: string
  /** Name or id; default: `default`. */
  pool?: string
  /** Default: told by the content. With `raw` the content is never looked at. */
  format?: ImageFormat
}

export interface ImportFileOptions extends ImportOptions {
  /** Absolute. */
  path: string
}

export interface ImportUrlOptions extends ImportOptions {
  /** `http://…`, `https://…`, `nbd://…` or `nbd+unix://…`. */
  url: string
}

export interface ImportStreamOptions extends ImportOptions {
  stream: AsyncIterable<Uint8Array>
  /** If it is known: a stream that ends earlier is refused. */
  sizeBytes?: number
  /** Ends the waiting for the first bytes with JobInterrupted. */
  signal?: AbortSignal
}

export interface ExportOptions extends ProjectScope {
  /** Absolute path of the file to be made. */
  path: string
  /** `raw` (default) or `qcow2`. */
  format?: string
  /** Default false. True: the clusters of a qcow2 file are compressed. */
  compress?: boolean
  /** Default false. True: a regular file that is there is replaced when the export is whole. */
  overwrite?: boolean
}

/** What an import writes, found out before anything is made. */
interface PlannedImport {
  kind: string
  params: JsonObject
  /** Of the image; null: the stream tells at its end. */
  sizeBytes: number | null
}

export interface ImageServiceParts {
  targets: ImportTargets
  streams: ImportStreams
  urls: SecretUrls
  setTimer: SetTimer
  inspectLimitMs: number
}

export class ImageService {
  private readonly context: ServiceContext
  private readonly targets: ImportTargets
  private readonly streams: ImportStreams
  private readonly urls: SecretUrls
  private readonly setTimer: SetTimer
  private readonly inspectLimitMs: number

  constructor(context: ServiceContext, parts: ImageServiceParts) {
    this.context = context
    this.targets = parts.targets
    this.streams = parts.streams
    this.urls = parts.urls
    this.setTimer = parts.setTimer
    this.inspectLimitMs = parts.inspectLimitMs
  }

  /**
   * Starts the import of a file. What can be refused by looking at it is refused here, and nothing is made then; where looking
   * takes longer than `inspectLimitMs` the job goes on with it, and fails with the same codes.
   * The image is there at once with status `queued`; the job's `subject` is its id.
   * @throws AtollError NAME_INVALID, NAME_TAKEN, IMAGE_SOURCE_INVALID, IMAGE_FORMAT_UNSUPPORTED, IMAGE_CORRUPT, IMAGE_ENCRYPTED,
   *   IMAGE_HAS_BACKING_FILE, IMAGE_HAS_DATA_FILE, IMAGE_FEATURE_UNSUPPORTED, SIZE_INVALID, QEMU_IMG_MISSING, POOL_NOT_FOUND, JOB_QUEUE_FULL
   */
  async import(options: ImportFileOptions): Promise<JobView> {
    const place = await this.placeOf(options)
    const source = await ImageSource.open(options.path)
    let planned: PlannedImport
    try {
      planned = await this.planFile(source, options.format)
    } finally {
      await source.close()
    }
    return await this.begin(options, place, planned)
  }

  /**
   * Starts the import of what a URL names. HTTP is asked when the job runs, so what is wrong there makes the job fail; an NBD
   * server is asked for the size first. An NBD export is taken as it is, never probed.
   * @throws AtollError NAME_INVALID, NAME_TAKEN, IMAGE_SOURCE_INVALID, IMAGE_FETCH_FAILED, IMAGE_FORMAT_UNSUPPORTED, SIZE_INVALID,
   *   POOL_NOT_FOUND, JOB_QUEUE_FULL
   */
  async importUrl(options: ImportUrlOptions): Promise<JobView> {
    const place = await this.placeOf(options)
    if (/^nbd[a-z+]*:/.test(options.url)) {
      if (options.format !== undefined && options.format !== 'raw') {
        throw new AtollError(
          'IMAGE_FORMAT_UNSUPPORTED',
          `an NBD export is a disk, whose content is taken as it is: it cannot be imported as ${options.format}`,
          { values: { format: options.format } },
        )
      }
      const params = await inspectNbd(options.url)
      return await this.begin(options, place, { kind: 'image-import-nbd', params, sizeBytes: params.sizeBytes })
    }
    const url = parseHttpUrl(options.url)
    const params = { ...SecretUrls.split(url), format: options.format ?? null }
    if (params.format !== null && params.format !== 'raw') await requireQemuImg()
    return await this.begin(options, place, { kind: 'image-import-http', params, sizeBytes: null }, (imageId) => {
      if (params.hasSecrets) this.urls.add(imageId, url)
    })
  }

  /**
   * Starts the import of a stream. Any format but raw is kept in the home until it is whole. The stream is read as fast as it can be stored; when the job ends early it is
   * not read further. The job cannot be paused and does not survive a restart of the daemon.
   * @throws AtollError as `import`, IMAGE_STREAM_LOST
   */
  async importStream(options: ImportStreamOptions): Promise<JobView> {
    if (options.sizeBytes !== undefined) checkImageSize(options.sizeBytes)
    const place = await this.placeOf(options)
    const stream = await ImageStream.begin(options.stream, options.format, options.signal)
    try {
      const sizeBytes = options.sizeBytes ?? null
      const params = { sizeBytes, format: options.format ?? null }
      if (stream.format !== 'raw') await requireQemuImg()
      // What arrives is as large as the image only if it is raw.
      const imageBytes = stream.format === 'raw' ? sizeBytes : null
      return await this.begin(options, place, { kind: 'image-import-stream', params, sizeBytes: imageBytes }, (imageId) => {
        this.streams.add(imageId, stream)
      })
    } catch (error) {
      stream.end()
      throw error
    }
  }

  /**
   * Starts writing an image (or `snapshot:VOLUME@SNAPSHOT`) to a file.
   * @throws AtollError DESTINATION_INVALID, DESTINATION_EXISTS, IMAGE_FORMAT_UNSUPPORTED, RESOURCE_STATUS, IMAGE_NOT_FOUND, NAME_AMBIGUOUS
   */
  async export(image: string, options: ExportOptions): Promise<JobView> {
    const { resolver, jobs, locks, catalog } = this.context
    const format = options.format ?? 'raw'
    if (format !== 'raw' && format !== 'qcow2') {
      throw new AtollError('IMAGE_FORMAT_UNSUPPORTED', `images cannot be exported as ${format}; raw and qcow2 can`, {
        values: { format },
      })
    }
    const compress = options.compress ?? false
    if (compress && format === 'raw') {
      throw new AtollError('ARGUMENT_INVALID', 'a raw file cannot be compressed: export as qcow2', { values: { format } })
    }
    if (format === 'qcow2') await requireQemuImg()
    const { id } = image.startsWith('snapshot:')
      ? await resolver.source(image, options)
      : await resolver.resource('image', image, options)
    const overwrite = options.overwrite ?? false
    await checkDestination(options.path, overwrite)
    return await locks.run(id, async () => {
      const row = await reread(catalog, id)
      requireAvailable(row, 'exported')
      const destination = { path: options.path, overwrite }
      return await jobs.start({
        projectId: row.project_id,
        kind: format === 'raw' ? 'image-export' : 'image-export-qcow2',
        subject: id,
        params: format === 'raw' ? destination : { ...destination, compress },
        totalBytes: row.size_bytes,
      })
    })
  }

  /**
   * Makes an image of a snapshot (`VOLUME@SNAPSHOT`), of a volume as it is now (`volume:NAME`), of another image or of a file
   * (`file:CONTAINER/NAME`); no byte is copied.
   * @throws AtollError NAME_INVALID, NAME_TAKEN, SNAPSHOT_NOT_FOUND, VOLUME_NOT_FOUND, FILE_NOT_FOUND, SIZE_INVALID, NAME_AMBIGUOUS
   */
  async create(options: ProjectScope & NamePolicy & { name: string; from: string }): Promise<ImageView> {
    const { catalog, mapper, resolver, locks } = this.context
    checkName('image', options.name)
    const project = await resolver.project(options)
    const isSource = /^(image|snapshot|volume|file):/.test(options.from) || !options.from.includes('@')
    const source = isSource
      ? await resolver.source(options.from, options)
      : await resolver.resource('snapshot', options.from, options)
    // A file may be empty, an image not.
    checkImageSize(source.size_bytes)
    const row = await locks.run(nameKey('image', project.id, options.name), async () => {
      if (options.allowDuplicateName !== true) await requireFreeName(catalog, 'image', project.id, options.name)
      return await mapper.createImage({ projectId: project.id, name: options.name, fromId: source.id })
    })
    return await this.view(row)
  }

  /** The images of the project, oldest first. @throws AtollError ARGUMENT_INVALID */
  async list(options: ProjectScope & PageOptions = {}): Promise<Page<ImageView>> {
    const { catalog, resolver, jobs } = this.context
    const project = await resolver.project(options)
    const { entries, next } = await pageOfResources(catalog, { kind: 'image', projectId: project.id }, options)
    const sources = await viewSources(this.context)
    const subjects = jobs.subjects()
    return { entries: entries.map((row) => imageView(row, resourceView(row, sources), subjects)), next }
  }

  /** @throws AtollError IMAGE_NOT_FOUND, NAME_AMBIGUOUS */
  async show(image: string, scope: ProjectScope = {}): Promise<ImageView & ResourceUsage & PoolsRead> {
    const row = await this.context.resolver.resource('image', image, scope)
    return await withUsage(this.context, await withPoolsRead(this.context, await this.view(row)))
  }

  /** Deletes an image; what was made from it stays. @throws AtollError IMAGE_IN_USE, IMAGE_NOT_FOUND, NAME_AMBIGUOUS */
  async delete(image: string, scope: ProjectScope = {}): Promise<void> {
    const { catalog, mapper, resolver, locks, reclaim } = this.context
    const { id } = await resolver.resource('image', image, scope)
    await locks.run(id, async () => {
      requireUnused(this.context, await reread(catalog, id), 'deleted')
      await mapper.deleteResource(id)
    })
    reclaim.request()
  }

  /** @throws AtollError NAME_INVALID, NAME_TAKEN, IMAGE_NOT_FOUND, NAME_AMBIGUOUS */
  async rename(image: string, name: string, options: ProjectScope & NamePolicy = {}): Promise<ImageView> {
    const { catalog, mapper, resolver, locks, attachments } = this.context
    checkName('image', name)
    const { id, project_id: projectId, name: oldName } = await resolver.resource('image', image, options)
    await locks.runAll([id, nameKey('image', projectId, name)], async () => {
      if (name === oldName) return
      if (options.allowDuplicateName !== true) await requireFreeName(catalog, 'image', projectId, name)
      await mapper.rename(id, name)
      attachments.rename(id, name)
    })
    return await this.view(await reread(catalog, id))
  }

  private async planFile(source: ImageSource, format: ImageFormat | undefined): Promise<PlannedImport> {
    const { identity } = source
    const late = new AbortController()
    const cancel = this.setTimer(() => late.abort(), this.inspectLimitMs)
    let plan: ImagePlan
    try {
      plan = await planImage(source, format, identity.path, late.signal)
    } catch (error) {
      if (!late.signal.aborted || isAtollError(error)) throw error
      await requireQemuImg()
      return { kind: 'image-import-inspect', params: { source: identity, format: format ?? null }, sizeBytes: null }
    } finally {
      cancel()
    }
    const { virtualSizeBytes: sizeBytes } = plan
    if (plan.how === 'copy') return { kind: 'image-import-raw', params: { source: identity, sizeBytes }, sizeBytes }
    await requireQemuImg()
    const { how: _how, ...convert } = plan
    return { kind: 'image-import-convert', params: { source: identity, ...convert }, sizeBytes }
  }

  private async placeOf(options: ImportOptions): Promise<{ project: ProjectRow; pool: PoolRow }> {
    const { catalog, resolver } = this.context
    checkName('image', options.name)
    const project = await resolver.project(options)
    // Looked at again under the lock; here, so that nothing is read in vain.
    if (options.allowDuplicateName !== true) await requireFreeName(catalog, 'image', project.id, options.name)
    return { project, pool: await resolver.pool(options.pool ?? defaultPoolName) }
  }

  /** Makes the image, then its job. A crash in between leaves an image that the next start removes. */
  private async begin(
    options: ImportOptions,
    place: { project: ProjectRow; pool: PoolRow },
    planned: PlannedImport,
    keep: (imageId: string) => void = () => undefined,
  ): Promise<JobView> {
    const { catalog, locks, jobs } = this.context
    return await locks.run(nameKey('image', place.project.id, options.name), async () => {
      if (options.allowDuplicateName !== true) await requireFreeName(catalog, 'image', place.project.id, options.name)
      const imageId = await this.targets.begin({
        projectId: place.project.id,
        name: options.name,
        sizeBytes: planned.sizeBytes,
        poolId: place.pool.id,
      })
      keep(imageId)
      try {
        return await jobs.start({
          projectId: place.project.id,
          kind: planned.kind,
          subject: imageId,
          params: planned.params,
          totalBytes: planned.sizeBytes,
        })
      } catch (error) {
        this.streams.drop(imageId)
        this.urls.drop(imageId)
        await this.targets.abort(imageId)
        throw error
      }
    })
  }

  private async view(row: ResourceRow): Promise<ImageView> {
    return imageView(row, await viewOfOne(this.context, row), this.context.jobs.subjects())
  }
}

function requireAvailable(row: ResourceRow, what: string): void {
  if (row.status === 'available') return
  throw new AtollError('RESOURCE_STATUS', `${row.kind} ${row.name} is ${row.status} and cannot be ${what}`, {
    values: { id: row.id, status: row.status },
  })
}

function imageView(row: ResourceRow, view: Parameters<typeof imageStatus>[1], subjects: ReadonlyMap<string, string>): ImageView {
  return { ...view, status: imageStatus(row, view), jobId: row.status === 'creating' ? (subjects.get(row.id) ?? null) : null }
}
