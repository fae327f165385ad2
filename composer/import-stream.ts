/**
 * The job that writes a stream of raw bytes into an image. A stream cannot be read twice: the job cannot be paused, and one
 * that a restart of the daemon interrupts fails and leaves nothing.
 */
import { AtollError, volumeSizeMaxBytes, type JsonObject } from '@atoll/core'
import { detectFormat, magicHeadBytes, magicTailBytes, requireSupported, type ImageFormat } from './image-format.ts'
import { checkImageSize } from './image-size.ts'
import type { ImportTargets } from './import-targets.ts'
import { JobInterrupted, type JobContext, type JobKind } from './job-kind.ts'
import { nonZeroRuns, zeroBlockBytes } from './non-zero-runs.ts'

/** Chunks of the stream are gathered to writes of this size. */
const writeBytes = 2 ** 20
/** A single chunk of the stream may be this large. */
const chunkBytesMax = 64 * 2 ** 20

export interface StreamImportParams extends JsonObject {
  /** null: known when the stream ends. */
  sizeBytes: number | null
  format: 'raw' | null
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
        'the daemon was restarted while the stream was imported: start the import again',
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
  private readonly iterator: AsyncIterator<Uint8Array>
  private readonly head: Buffer
  private headTaken = false

  private constructor(iterator: AsyncIterator<Uint8Array>, head: Buffer) {
    this.iterator = iterator
    this.head = head
  }

  /**
   * Reads the first bytes; without `format` their magic must not be that of a foreign format.
   * @throws AtollError IMAGE_FORMAT_UNSUPPORTED, IMAGE_STREAM_LOST
   */
  static async begin(stream: AsyncIterable<Uint8Array>, format: ImageFormat | undefined): Promise<ImageStream> {
    const iterator = stream[Symbol.asyncIterator]()
    let head = Buffer.alloc(0)
    while (head.length < magicHeadBytes) {
      const chunk = await nextChunk(iterator)
      if (chunk === null) break
      head = Buffer.concat([head, chunk])
    }
    const begun = new ImageStream(iterator, head)
    try {
      const found = format ?? requireSupported(detectFormat(head, new Uint8Array()), 'the stream')
      if (found !== 'raw') {
        throw new AtollError(
          'IMAGE_FORMAT_UNSUPPORTED',
          `an image of the format ${found} cannot be read from a stream: save it to a file and import that`,
          {
            values: { format: found },
          },
        )
      }
      return begun
    } catch (error) {
      begun.end()
      throw error
    }
  }

  /** The next bytes; null at the end. @throws JobInterrupted when the signal is aborted */
  async next(signal: AbortSignal): Promise<Buffer | null> {
    if (!this.headTaken) {
      this.headTaken = true
      if (this.head.length > 0) return this.head
    }
    if (signal.aborted) throw new JobInterrupted()
    const interrupted = Promise.withResolvers<never>()
    const abort = (): void => interrupted.reject(new JobInterrupted())
    signal.addEventListener('abort', abort, { once: true })
    try {
      return await Promise.race([nextChunk(this.iterator), interrupted.promise])
    } finally {
      signal.removeEventListener('abort', abort)
    }
  }

  /** Tells the sender that nothing more is read. Not waited for: a read that is under way may never end. */
  end(): void {
    this.iterator.return?.().catch(() => {
      // It failed before; the reader knows.
    })
  }
}

async function nextChunk(iterator: AsyncIterator<Uint8Array>): Promise<Buffer | null> {
  let step: IteratorResult<Uint8Array>
  try {
    step = await iterator.next()
  } catch (error) {
    throw new AtollError('IMAGE_STREAM_LOST', `the stream broke: ${error instanceof Error ? error.message : String(error)}`, {
      cause: error,
    })
  }
  if (step.done === true) return null
  const { value } = step
  if (value.length > chunkBytesMax) {
    throw new AtollError(
      'ARGUMENT_INVALID',
      `a chunk of the stream has ${value.length} bytes; at most ${chunkBytesMax} are allowed`,
      {
        values: { lengthBytes: value.length, limitBytes: chunkBytesMax },
      },
    )
  }
  return Buffer.from(value.buffer, value.byteOffset, value.length)
}

export function streamImportKind(targets: ImportTargets, streams: ImportStreams): JobKind {
  return {
    kind: 'image-import-stream',
    pausable: false,
    parallelMax: 4,
    run: (context) => writeStream(context, targets, streams),
    async discard({ subject }) {
      streams.drop(subject)
      await targets.abort(subject)
    },
  }
}

async function writeStream(context: JobContext, targets: ImportTargets, streams: ImportStreams): Promise<JsonObject> {
  const params = context.params as StreamImportParams
  const target = await targets.get(context.subject)
  // The job was stopped between the image's last commit and its own.
  if (target === null) return { imageId: context.subject }
  const stream = streams.take(context.subject)
  const limitBytes = params.sizeBytes ?? volumeSizeMaxBytes
  let pending: Buffer[] = []
  let pendingBytes = 0
  let writtenBytes = 0
  let tail = Buffer.alloc(0)
  // Whole blocks only, so that a block of zeros is seen as one wherever the chunks of the stream end.
  const writePending = async (lengthBytes: number): Promise<void> => {
    const data = Buffer.concat(pending)
    for (const { startBytes, endBytes } of nonZeroRuns(data.subarray(0, lengthBytes))) {
      await target.device.write(writtenBytes + startBytes, data.subarray(startBytes, endBytes))
    }
    writtenBytes += lengthBytes
    pending = [data.subarray(lengthBytes)]
    pendingBytes -= lengthBytes
    context.report(writtenBytes, params.sizeBytes)
  }
  for (;;) {
    const chunk = await stream.next(context.signal)
    if (chunk === null) break
    if (writtenBytes + pendingBytes + chunk.length > limitBytes) {
      throw new AtollError('SIZE_INVALID', `the stream has more than ${limitBytes} bytes`, { values: { limitBytes } })
    }
    pending.push(chunk)
    pendingBytes += chunk.length
    tail = Buffer.concat([tail, chunk.subarray(-magicTailBytes)]).subarray(-magicTailBytes)
    if (pendingBytes >= writeBytes) await writePending(pendingBytes - (pendingBytes % zeroBlockBytes))
  }
  await writePending(pendingBytes)
  checkImageSize(writtenBytes)
  if (params.sizeBytes !== null && writtenBytes !== params.sizeBytes) {
    throw new AtollError('IMAGE_STREAM_LOST', `the stream ended after ${writtenBytes} of ${params.sizeBytes} bytes`, {
      values: { sizeBytes: params.sizeBytes, receivedBytes: writtenBytes },
    })
  }
  if (params.format === null) requireSupported(detectFormat(new Uint8Array(), tail), 'the stream')
  await targets.finish(context.subject, writtenBytes)
  streams.drop(context.subject)
  return { imageId: context.subject, sizeBytes: writtenBytes }
}
