/**
 * The job that fetches an image over HTTP. Raw content goes straight into the image, any other format into the spool first and
 * is converted from there.
 *
 * Rules:
 * - What was saved is durable, and it is only gone on from there when the server says that the content is still the same
 *   (Range and If-Range with a strong ETag or a date). Otherwise the transfer begins anew.
 * - The row of the job has the URL without user, password and query. The whole URL is kept in memory only; a job whose URL had
 *   one of them does not survive a restart of the daemon.
 */
import { AtollError, volumeSizeMaxBytes, type JsonObject } from '@atoll/core'
import type { ImportTarget } from '@atoll/mapper'
import { detectFormat, magicHeadBytes, requireSupported, type ImageFormat } from './image-format.ts'
import { checkImageSize } from './image-size.ts'
import { openHttp, shownUrl, TransientFetchFailure, type FetchedBody, type FetchPolicy } from './import-http-fetch.ts'
import { DeviceSink, type ImportSink } from './import-sink.ts'
import { storeSpooled, type SpooledOptions } from './import-unplanned.ts'
import { rawImageSize } from './import-stream.ts'
import { JobInterrupted, type JobContext, type JobKind } from './job-kind.ts'
import { delay, type SetTimer } from './timers.ts'

/** What was fetched is made durable, and the cursor saved, after so many bytes. */
export const saveEveryBytesDefault = 256 * 2 ** 20
/** So many failures in a row, without so many new bytes between them, end the job. */
const failuresMax = 5
const progressBytesMin = 64 * 1024
const retryDelayMsDefault = 500

export interface HttpImportParams extends JsonObject {
  /** As it may be shown. */
  url: string
  /** The URL has secrets that are not stored. */
  hasSecrets: boolean
  /** null: told by the content. */
  format: ImageFormat | null
}

interface HttpCursor extends JsonObject {
  /** `store`: everything is in the spool. */
  phase: 'fetch' | 'store'
  /** Where the content goes; null: no byte was seen yet. */
  into: 'image' | 'spool' | null
  /** Durable. */
  offsetBytes: number
  /** The image may hold bytes of an earlier transfer up to here. */
  dirtyBytes: number
  /** What was in a spool that is not here any more may have been stored in the image. */
  wasStored: boolean
  totalBytes: number | null
  validator: string | null
}

/** The URLs with secrets of the jobs that are not finished, by the id of their image. */
export class SecretUrls {
  private readonly urls = new Map<string, URL>()

  /** The URL as it may be stored, and whether something was left out. */
  static split(url: URL): { url: string; hasSecrets: boolean } {
    return { url: shownUrl(url), hasSecrets: url.username !== '' || url.password !== '' || url.search !== '' }
  }

  add(imageId: string, url: URL): void {
    this.urls.set(imageId, url)
  }

  get(imageId: string, params: HttpImportParams): URL {
    if (!params.hasSecrets) return new URL(params.url)
    const url = this.urls.get(imageId)
    if (url !== undefined) return url
    throw new AtollError(
      'IMAGE_STREAM_LOST',
      `the daemon was restarted while ${params.url} was fetched, and its credentials or query are not stored: start the import again`,
      { values: { source: params.url } },
    )
  }

  drop(imageId: string): void {
    this.urls.delete(imageId)
  }
}

export interface HttpImportOptions extends SpooledOptions {
  urls: SecretUrls
  policy: Omit<FetchPolicy, 'setTimer'>
  setTimer: SetTimer
  saveEveryBytes?: number
  /** After the first failure; doubled with each. Default 500. */
  retryDelayMs?: number
}

export function httpImportKind(options: HttpImportOptions): JobKind {
  return {
    kind: 'image-import-http',
    pausable: true,
    parallelMax: 4,
    run: (context) => importHttp(context, options),
    async discard({ subject }) {
      options.urls.drop(subject)
      await options.spool.remove(subject)
      await options.targets.abort(subject)
    },
  }
}

async function importHttp(context: JobContext, options: HttpImportOptions): Promise<JsonObject> {
  const params = context.params as HttpImportParams
  const target = await options.targets.get(context.subject)
  // The job was stopped between the image's last commit and its own.
  if (target === null) {
    await options.spool.remove(context.subject)
    return { imageId: context.subject }
  }
  const url = options.urls.get(context.subject, params)
  const fetch = new Fetch(context, options, target, url, params)
  await fetch.run()
  let result: JsonObject
  if (fetch.cursor.into === 'spool') {
    const begunBefore = fetch.cursor.phase === 'store' || fetch.cursor.wasStored === true
    await context.save({ ...fetch.cursor, phase: 'store' })
    const format = params.format ?? undefined
    result = await storeSpooled(context, options, { target, format, name: params.url, begunBefore })
  } else {
    const sizeBytes = await rawImageSize(target.device, fetch.cursor.offsetBytes, params.format)
    await options.targets.finish(context.subject, sizeBytes)
    result = { imageId: context.subject, sizeBytes }
  }
  options.urls.drop(context.subject)
  return result
}

/** One transfer over as many connections as it needs. */
class Fetch {
  cursor: HttpCursor
  private readonly context: JobContext
  private readonly options: HttpImportOptions
  private readonly target: ImportTarget
  private readonly url: URL
  private readonly params: HttpImportParams
  private readonly policy: FetchPolicy
  private readonly saveEveryBytes: number

  constructor(context: JobContext, options: HttpImportOptions, target: ImportTarget, url: URL, params: HttpImportParams) {
    this.context = context
    this.options = options
    this.target = target
    this.url = url
    this.params = params
    this.policy = { ...options.policy, setTimer: options.setTimer }
    this.saveEveryBytes = options.saveEveryBytes ?? saveEveryBytesDefault
    const cursor = context.cursor as HttpCursor | null
    const fresh: HttpCursor = {
      phase: 'fetch',
      into: null,
      offsetBytes: 0,
      dirtyBytes: 0,
      wasStored: false,
      totalBytes: null,
      validator: null,
    }
    this.cursor = cursor ?? fresh
    // Between two saves less than this is written.
    if (cursor !== null) this.noteDirty(cursor.offsetBytes + 2 * this.saveEveryBytes)
  }

  /** Returns when everything is in the image or in the spool; there it is durable. */
  async run(): Promise<void> {
    const { into, offsetBytes, phase } = this.cursor
    if (into === 'spool' && !(await this.options.spool.holds(this.context.subject, offsetBytes))) {
      // It lies in the home of the daemon that began; this one fetches it itself.
      this.options.log.info(
        { imageId: this.context.subject },
        'what had arrived of an image is not in this home: it is fetched anew',
      )
      this.noteDirty(phase === 'store' ? this.target.device.sizeBytes() : 0)
      await this.beginAnew(phase === 'store')
    }
    if (this.cursor.phase === 'store') return
    // Before the first byte is written, so that a restart knows that some may have been.
    if (this.context.cursor === null) await this.context.save(this.cursor)
    let failures = 0
    let furthestBytes = this.cursor.offsetBytes
    for (;;) {
      this.context.checkInterrupted()
      // Everything arrived before the daemon was stopped.
      if (this.cursor.offsetBytes > 0 && this.cursor.offsetBytes === this.cursor.totalBytes) return
      try {
        await this.attempt()
        return
      } catch (error) {
        if (!(error instanceof TransientFetchFailure)) throw error
        if (this.cursor.offsetBytes >= furthestBytes + progressBytesMin) failures = 0
        furthestBytes = Math.max(furthestBytes, this.cursor.offsetBytes)
        failures += 1
        if (failures >= failuresMax) {
          throw new AtollError(
            'IMAGE_FETCH_FAILED',
            `${this.params.url} cannot be fetched: ${error.message} (after ${this.cursor.offsetBytes} of ${this.cursor.totalBytes ?? 'unknown'} bytes, ${failures} attempts)`,
            { values: { source: this.params.url, offsetBytes: this.cursor.offsetBytes }, cause: error },
          )
        }
        await delay(
          this.options.setTimer,
          (this.options.retryDelayMs ?? retryDelayMsDefault) * 2 ** (failures - 1),
          this.context.signal,
        )
      }
    }
  }

  /** One connection. Whatever ends it, what it brought is saved. */
  private async attempt(): Promise<void> {
    const { offsetBytes, validator } = this.cursor
    const range = offsetBytes > 0 && validator !== null ? { startBytes: offsetBytes, validator } : null
    const body = await openHttp(this.url, range, this.policy, this.context.signal)
    try {
      const { totalBytes } = body
      if (totalBytes !== null) checkImageSize(totalBytes)
      if (body.startBytes !== offsetBytes || (offsetBytes > 0 && totalBytes !== this.cursor.totalBytes)) {
        if (body.startBytes !== 0) throw this.changed()
        await this.beginAnew()
      }
      this.cursor = { ...this.cursor, totalBytes, validator: body.validator }
      await this.take(body)
    } finally {
      body.close()
    }
  }

  private async take(body: FetchedBody): Promise<void> {
    let head = Buffer.alloc(0)
    let ended = false
    if (this.cursor.into === null) {
      while (head.length < magicHeadBytes && !ended) {
        const chunk = await body.next()
        if (chunk === null) ended = true
        else head = Buffer.concat([head, chunk])
      }
      const format = this.params.format ?? requireSupported(detectFormat(head, new Uint8Array()), this.params.url)
      this.cursor = { ...this.cursor, into: format === 'raw' ? 'image' : 'spool' }
      if (this.cursor.into === 'image') await this.zeroTarget()
    }
    const { offsetBytes, totalBytes } = this.cursor
    const spooling =
      this.cursor.into === 'spool' ? await this.options.spool.open(this.context.subject, offsetBytes, totalBytes) : null
    const sink: ImportSink = spooling ?? new DeviceSink(this.target.device, offsetBytes)
    try {
      try {
        if (head.length > 0) await this.write(sink, head)
        for (let chunk = ended ? null : await body.next(); chunk !== null; chunk = await body.next())
          await this.write(sink, chunk)
      } catch (error) {
        // A broken connection or a pause loses nothing that arrived.
        if (error instanceof TransientFetchFailure || error instanceof JobInterrupted) await this.save(sink)
        throw error
      }
      await sink.end()
      await this.save(sink)
    } finally {
      await spooling?.close()
    }
    const receivedBytes = sink.takenBytes
    if (totalBytes !== null && receivedBytes !== totalBytes) {
      throw new TransientFetchFailure(`the content ended after ${receivedBytes} of ${totalBytes} bytes`)
    }
    checkImageSize(receivedBytes)
    this.cursor = { ...this.cursor, offsetBytes: receivedBytes }
  }

  private async write(sink: ImportSink, chunk: Buffer): Promise<void> {
    const limitBytes = this.cursor.totalBytes ?? volumeSizeMaxBytes
    if (sink.takenBytes + chunk.length > limitBytes) {
      throw new AtollError('SIZE_INVALID', `${this.params.url} has more than ${limitBytes} bytes`, { values: { limitBytes } })
    }
    await sink.write(chunk)
    this.noteDirty(sink.takenBytes)
    this.context.report(sink.takenBytes, this.cursor.totalBytes)
    if (sink.takenBytes - this.cursor.offsetBytes >= this.saveEveryBytes) await this.save(sink)
  }

  private async save(sink: ImportSink): Promise<void> {
    this.cursor = { ...this.cursor, offsetBytes: await sink.save() }
    await this.context.save(this.cursor)
  }

  /** The content is another one, or the server cannot go on in the middle. */
  private async beginAnew(wasStored = false): Promise<void> {
    // The cursor first: what it vouches for is about to go.
    const fresh: Partial<HttpCursor> = { phase: 'fetch', into: null, offsetBytes: 0, totalBytes: null, validator: null }
    this.cursor = { ...this.cursor, ...fresh, ...(wasStored ? { wasStored } : {}) }
    await this.context.save(this.cursor)
    await this.options.spool.remove(this.context.subject)
  }

  /** Blocks of zeros are not written, so nothing else may be where they belong. */
  private async zeroTarget(): Promise<void> {
    const lengthBytes = Math.min(this.cursor.dirtyBytes, this.target.device.sizeBytes())
    if (lengthBytes > 0) await this.target.device.writeZeroes(0, lengthBytes)
    await this.target.device.flush()
    this.cursor = { ...this.cursor, dirtyBytes: 0 }
  }

  private noteDirty(untilBytes: number): void {
    if (untilBytes > this.cursor.dirtyBytes) this.cursor = { ...this.cursor, dirtyBytes: untilBytes }
  }

  private changed(): AtollError {
    return new AtollError('IMAGE_SOURCE_CHANGED', `${this.params.url} changed while it was fetched: import it again`, {
      values: { source: this.params.url },
    })
  }
}
