/**
 * The job that makes an image of a stream: raw bytes go straight into it, any other format into the spool first. A stream
 * cannot be read twice: the job cannot be paused, and one that a restart of the daemon interrupts fails and leaves nothing.
 */
import { AtollError, volumeSizeMaxBytes, type JsonObject } from '@atoll/core'
import type { Device } from '@atoll/native'
import { ByteStream } from './byte-stream.ts'
import { detectFormat, magicHeadBytes, requireSupported, type ImageFormat } from './image-format.ts'
import { fixedVhdSize, isVhdFooter, vhdFooterBytes } from './image-inspect-vhd.ts'
import { checkImageSize } from './image-size.ts'
import { DeviceSink, type ImportSink } from './import-sink.ts'
import type { Spool } from './import-spool.ts'
import { storeSpooled, type SpooledOptions } from './import-unplanned.ts'
import type { ImportTargets } from './import-targets.ts'
import { JobInterrupted, type JobContext, type JobKind } from './job-kind.ts'

/** A single chunk of the stream may be this large. */
const chunkBytesMax = 64 * 2 ** 20

export interface StreamImportParams extends JsonObject {
  /** null: known when the stream ends. */
  sizeBytes: number | null
  /** As it was asked for; null: told by the content. */
  format: ImageFormat | null
}

/** The streams of the jobs that are not finished, by the id of their image. */
export class ImportStreams {
  private readonly streams = new Map<string, ImageStream>()

  add(imageId: string, stream: ImageStream): void {
    this.streams.set(imageId, stream)
  }

  take(imageId: string): ImageStream {
    const stream = this.streams.get(imageId)
    if (stream === undefined) {
      throw new AtollError(
        'IMAGE_STREAM_LOST',
        'the daemon was restarted, or another one took its place, while the stream was imported: start the import again',
        { values: { imageId } },
      )
    }
    return stream
  }

  drop(imageId: string): void {
    this.streams.get(imageId)?.end()
    this.streams.delete(imageId)
  }
}

/** A stream whose first bytes were looked at. */
export class ImageStream {
  private readonly stream: ByteStream
  private readonly head: Buffer
  private headTaken = false
  /** As it was asked for, or as the first bytes say. */
  format: ImageFormat = 'raw'

  private constructor(stream: ByteStream, head: Buffer) {
    this.stream = stream
    this.head = head
  }

  /**
   * Reads the first bytes; without `format` their magic tells what it is.
   * @throws AtollError IMAGE_FORMAT_UNSUPPORTED, IMAGE_STREAM_LOST; JobInterrupted when the signal is aborted
   */
  static async begin(
    source: AsyncIterable<Uint8Array>,
    format: ImageFormat | undefined,
    signal?: AbortSignal,
  ): Promise<ImageStream> {
    const stream = new ByteStream(source, { code: 'IMAGE_STREAM_LOST', what: 'stream' })
    try {
      let head = Buffer.alloc(0)
      while (head.length < magicHeadBytes) {
        const chunk = await stream.next(signal)
        if (chunk === null) break
        head = Buffer.concat([head, bounded(chunk)])
      }
      const begun = new ImageStream(stream, head)
      begun.format = format ?? requireSupported(detectFormat(head, new Uint8Array()), 'the stream')
      return begun
    } catch (error) {
      stream.end()
      throw signal?.aborted === true ? new JobInterrupted() : error
    }
  }

  /** The next bytes; null at the end. @throws JobInterrupted when the signal is aborted */
  async next(signal: AbortSignal): Promise<Buffer | null> {
    if (!this.headTaken) {
      this.headTaken = true
      if (this.head.length > 0) return this.head
    }
    try {
      const chunk = await this.stream.next(signal)
      return chunk === null ? null : bounded(chunk)
    } catch (error) {
      throw signal.aborted ? new JobInterrupted() : error
    }
  }

  /** Tells the sender that nothing more is read. */
  end(): void {
    this.stream.end()
  }
}

function bounded(chunk: Buffer): Buffer {
  if (chunk.length <= chunkBytesMax) return chunk
  throw new AtollError(
    'ARGUMENT_INVALID',
    `a chunk of the stream has ${chunk.length} bytes; at most ${chunkBytesMax} are allowed`,
    {
      values: { lengthBytes: chunk.length, limitBytes: chunkBytesMax },
    },
  )
}

export interface StreamImportOptions extends SpooledOptions {
  streams: ImportStreams
}

export function streamImportKind(options: StreamImportOptions): JobKind {
  return {
    kind: 'image-import-stream',
    pausable: false,
    parallelMax: 4,
    run: (context) => importStream(context, options),
    discard: ({ subject }) => discardStream(subject, options),
  }
}

async function discardStream(
  imageId: string,
  { streams, spool, targets }: { streams: ImportStreams; spool: Spool; targets: ImportTargets },
): Promise<void> {
  streams.drop(imageId)
  await spool.remove(imageId)
  await targets.abort(imageId)
}

async function importStream(context: JobContext, options: StreamImportOptions): Promise<JsonObject> {
  const { streams, spool, targets } = options
  const params = context.params as StreamImportParams
  const target = await targets.get(context.subject)
  // The job was stopped between the image's last commit and its own.
  if (target === null) {
    await spool.remove(context.subject)
    return { imageId: context.subject }
  }
  const stream = streams.take(context.subject)
  if (stream.format !== 'raw') {
    const sink = await spool.open(context.subject, 0, params.sizeBytes)
    try {
      await receive(context, stream, sink, params)
    } finally {
      await sink.close()
    }
    const format = params.format ?? undefined
    const result = await storeSpooled(context, options, { target, format, name: 'the stream', begunBefore: false })
    streams.drop(context.subject)
    return result
  }
  const sink = new DeviceSink(target.device)
  await receive(context, stream, sink, params)
  const sizeBytes = await rawImageSize(target.device, sink.takenBytes, params.format)
  await targets.finish(context.subject, sizeBytes)
  streams.drop(context.subject)
  return { imageId: context.subject, sizeBytes }
}

/** @throws AtollError SIZE_INVALID, IMAGE_STREAM_LOST when it ends early */
async function receive(context: JobContext, stream: ImageStream, sink: ImportSink, params: StreamImportParams): Promise<void> {
  const limitBytes = params.sizeBytes ?? volumeSizeMaxBytes
  for (;;) {
    const chunk = await stream.next(context.signal)
    if (chunk === null) break
    if (sink.takenBytes + chunk.length > limitBytes) {
      throw new AtollError('SIZE_INVALID', `the stream has more than ${limitBytes} bytes`, { values: { limitBytes } })
    }
    await sink.write(chunk)
    context.report(sink.takenBytes, params.sizeBytes)
  }
  await sink.end()
  checkImageSize(sink.takenBytes)
  if (params.sizeBytes !== null && sink.takenBytes !== params.sizeBytes) {
    throw new AtollError('IMAGE_STREAM_LOST', `the stream ended after ${sink.takenBytes} of ${params.sizeBytes} bytes`, {
      values: { sizeBytes: params.sizeBytes, receivedBytes: sink.takenBytes },
    })
  }
}

/**
 * The size of an image that was written to the device as it came: without the footer if that makes a fixed VHD of it.
 * Content that is said to be raw is not looked at.
 */
export async function rawImageSize(device: Device, receivedBytes: number, format: ImageFormat | null): Promise<number> {
  if (format === 'raw' || receivedBytes <= vhdFooterBytes) return receivedBytes
  const tail = Buffer.from(await device.read(receivedBytes - vhdFooterBytes, vhdFooterBytes))
  return isVhdFooter(tail) ? fixedVhdSize(tail, receivedBytes) : receivedBytes
}
