/**
 * The job that copies an export of another NBD server into an image, holes kept. An export is somebody's disk: its content is
 * never probed, so a guest that writes the header of some format into its disk gains nothing.
 */
import { AtollError, type JsonObject } from '@atoll/core'
import type { Device } from '@atoll/native'
import { connect, info, NbdError, parseNbdUri, RetryingNbdConnection, type NbdConnectOptions } from '@atoll/nbd-client'
import { boundedParallel } from './bounded-parallel.ts'
import { checkImageSize } from './image-size.ts'
import { copyStepBytesDefault, stepsPerSave } from './import-raw.ts'
import type { ImportTargets } from './import-targets.ts'
import { JobInterrupted, type JobContext, type JobKind } from './job-kind.ts'
import { nonZeroRuns, zeroBlockBytes } from './non-zero-runs.ts'

/** One request reads this much. */
const readBytesMax = 2 ** 20
const readsParallelMax = 8
/** A server that is away for longer ends the job. */
const retryForMs = 60_000
const allocationContext = 'base:allocation'
/** Of an extent of `base:allocation`: it reads as zeros. */
const extentReadsZero = 2

export interface NbdImportParams extends JsonObject {
  uri: string
  sizeBytes: number
}

/**
 * Asks the server for the size of an export.
 * @throws AtollError IMAGE_SOURCE_INVALID, IMAGE_FETCH_FAILED, SIZE_INVALID
 */
export async function inspectNbd(uri: string): Promise<NbdImportParams> {
  try {
    parseNbdUri(uri)
  } catch (error) {
    throw new AtollError('IMAGE_SOURCE_INVALID', `${JSON.stringify(uri)} cannot be imported: ${(error as Error).message}`, {
      values: { source: uri },
      cause: error,
    })
  }
  const { sizeBytes } = await info(uri).catch((error: unknown) => {
    throw fetchFailed(uri, error)
  })
  checkImageSize(sizeBytes)
  return { uri, sizeBytes }
}

export function nbdImportKind(targets: ImportTargets, copyStepBytes = copyStepBytesDefault): JobKind {
  return {
    kind: 'image-import-nbd',
    pausable: true,
    parallelMax: 2,
    run: (context) => copyExport(context, targets, copyStepBytes),
    discard: async ({ subject }) => targets.abort(subject),
  }
}

async function copyExport(context: JobContext, targets: ImportTargets, copyStepBytes: number): Promise<JsonObject> {
  const { uri, sizeBytes } = context.params as NbdImportParams
  const result = { imageId: context.subject, sizeBytes }
  const target = await targets.get(context.subject)
  // The job was stopped between the image's last commit and its own.
  if (target === null) return result
  if (context.cursor === null) await context.save({ offsetBytes: 0 })
  let offsetBytes = Number(context.cursor?.['offsetBytes'] ?? 0)
  // The export may be a disk in use, so what is read now need not be what was read before: nothing old may show through.
  if (context.cursor !== null) {
    await target.device.writeZeroes(offsetBytes, Math.min(sizeBytes - offsetBytes, (stepsPerSave + 1) * copyStepBytes))
  }
  const source = await openSource(uri, sizeBytes, context.signal)
  // A server that is away must not hold up who pauses or cancels.
  const abort = (): void => void source.disconnect()
  context.signal.addEventListener('abort', abort, { once: true })
  try {
    let savedBytes = offsetBytes
    const save = async (): Promise<void> => {
      if (savedBytes === offsetBytes) return
      await target.device.flush()
      await context.save({ offsetBytes })
      savedBytes = offsetBytes
    }
    while (offsetBytes < sizeBytes) {
      if (context.signal.aborted) await save()
      context.checkInterrupted()
      const lengthBytes = Math.min(copyStepBytes, sizeBytes - offsetBytes)
      await copyStep(source, target.device, offsetBytes, lengthBytes)
      offsetBytes += lengthBytes
      context.report(offsetBytes, sizeBytes)
      if (offsetBytes - savedBytes >= stepsPerSave * copyStepBytes) await save()
    }
    await targets.finish(context.subject)
    return result
  } catch (error) {
    if (context.signal.aborted) throw new JobInterrupted()
    throw error instanceof NbdError ? fetchFailed(uri, error) : error
  } finally {
    context.signal.removeEventListener('abort', abort)
    await source.disconnect()
  }
}

async function openSource(uri: string, sizeBytes: number, signal: AbortSignal): Promise<RetryingNbdConnection> {
  const options: NbdConnectOptions & { retryForMs: number } = { metaContexts: [allocationContext], signal, retryForMs }
  const first = await connect(uri, options).catch((error: unknown) => {
    if (signal.aborted) throw new JobInterrupted()
    throw fetchFailed(uri, error)
  })
  const source = new RetryingNbdConnection(uri, options, first)
  if (first.sizeBytes === sizeBytes) return source
  await source.disconnect()
  throw new AtollError('IMAGE_SOURCE_CHANGED', `${uri} has ${first.sizeBytes} bytes now, not ${sizeBytes}: import it again`, {
    values: { source: uri, sizeBytes: first.sizeBytes },
  })
}

/** Copies what does not read as zeros. */
async function copyStep(source: RetryingNbdConnection, device: Device, startBytes: number, lengthBytes: number): Promise<void> {
  const endBytes = startBytes + lengthBytes
  const reads: { offsetBytes: number; lengthBytes: number }[] = []
  const maximumBytes = Math.max(zeroBlockBytes, Math.min(readBytesMax, source.connection.blockSizes.maximumBytes))
  let offsetBytes = startBytes
  while (offsetBytes < endBytes) {
    const { isZero, untilBytes } = await extentAt(source, offsetBytes, endBytes)
    while (offsetBytes < untilBytes) {
      const pieceBytes = isZero ? untilBytes - offsetBytes : Math.min(maximumBytes, untilBytes - offsetBytes)
      if (!isZero) reads.push({ offsetBytes, lengthBytes: pieceBytes })
      offsetBytes += pieceBytes
    }
  }
  await boundedParallel(reads, readsParallelMax, async (read) => {
    const data = await source.read(read.offsetBytes, read.lengthBytes)
    for (const run of nonZeroRuns(data)) {
      await device.write(read.offsetBytes + run.startBytes, data.subarray(run.startBytes, run.endBytes))
    }
  })
}

/** How far what holds at `offsetBytes` goes on; everything is data at a server that does not say. */
async function extentAt(
  source: RetryingNbdConnection,
  offsetBytes: number,
  endBytes: number,
): Promise<{ isZero: boolean; untilBytes: number }> {
  if (!source.connection.metaContexts.has(allocationContext)) return { isZero: false, untilBytes: endBytes }
  const [extent] = (await source.blockStatus(offsetBytes, endBytes - offsetBytes)).get(allocationContext) ?? []
  if (extent === undefined) return { isZero: false, untilBytes: endBytes }
  const untilBytes = Math.min(endBytes, extent.offsetBytes + extent.lengthBytes)
  return { isZero: (extent.flags & extentReadsZero) !== 0, untilBytes }
}

function fetchFailed(uri: string, error: unknown): AtollError {
  const { message } = error as Error
  return new AtollError('IMAGE_FETCH_FAILED', `${uri} cannot be read: ${message}`, { values: { source: uri }, cause: error })
}
