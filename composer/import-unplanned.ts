/**
 * Imports of sources that are inspected within the job: what arrived first and lies in the spool, and files whose tables take
 * longer to read than a request may.
 */
import type { JsonObject, Logger } from '@atoll/core'
import type { ImportTarget } from '@atoll/mapper'
import { requireQemuImg } from './convert-sandbox.ts'
import type { ImageFormat } from './image-format.ts'
import { planImage } from './image-inspect.ts'
import { ImageSource, type SourceIdentity } from './image-source.ts'
import { convertSource, type ConvertOptions } from './import-convert.ts'
import { copyStepBytesDefault } from './import-raw.ts'
import type { Spool } from './import-spool.ts'
import type { JobContext, JobKind } from './job-kind.ts'

export interface SpooledOptions extends ConvertOptions {
  spool: Spool
  log: Logger
}

export interface UnplannedImport {
  target: ImportTarget
  /** undefined: told by the content. */
  format: ImageFormat | undefined
  /** What the source is called in messages. */
  name: string
  /** Whether an interrupted attempt may have written into the target. */
  begunBefore: boolean
}

/** Makes the image of what lies in the spool. @throws AtollError as `planImage` and `convertSource`; JobInterrupted */
export async function storeSpooled(
  context: JobContext,
  options: SpooledOptions,
  unplanned: UnplannedImport,
): Promise<JsonObject> {
  const source = await ImageSource.open(options.spool.pathOf(context.subject))
  try {
    const result = await storeUnplanned(context, options, source, unplanned)
    await options.spool.remove(context.subject)
    return result
  } finally {
    await source.close()
  }
}

export interface InspectedImportParams extends JsonObject {
  source: SourceIdentity
  /** As it was asked for; null: told by the content. */
  format: ImageFormat | null
}

/** The job that inspects a file and makes the image of it. */
export function inspectedImportKind(options: ConvertOptions): JobKind {
  return {
    kind: 'image-import-inspect',
    pausable: true,
    parallelMax: 2,
    run: (context) => inspectAndStore(context, options),
    discard: async ({ subject }) => options.targets.abort(subject),
  }
}

async function inspectAndStore(context: JobContext, options: ConvertOptions): Promise<JsonObject> {
  const { source: identity, format } = context.params as InspectedImportParams
  const target = await options.targets.get(context.subject)
  // The job was stopped between the image's last commit and its own.
  if (target === null) return { imageId: context.subject }
  const begunBefore = context.cursor !== null
  if (!begunBefore) await context.save({ begun: true })
  const source = await ImageSource.openAgain(identity)
  try {
    return await storeUnplanned(context, options, source, {
      target,
      format: format ?? undefined,
      name: identity.path,
      begunBefore,
    })
  } finally {
    await source.close()
  }
}

async function storeUnplanned(
  context: JobContext,
  options: ConvertOptions,
  source: ImageSource,
  { target, format, name, begunBefore }: UnplannedImport,
): Promise<JsonObject> {
  const plan = await planImage(source, format, name, context.signal)
  const { virtualSizeBytes } = plan
  if (begunBefore) await target.device.writeZeroes(0, virtualSizeBytes)
  if (plan.how === 'convert') {
    await requireQemuImg()
    await convertSource(context, options, { source, target, plan })
  } else {
    for (let offsetBytes = 0; offsetBytes < virtualSizeBytes;) {
      context.checkInterrupted()
      const lengthBytes = Math.min(copyStepBytesDefault, virtualSizeBytes - offsetBytes)
      await target.device.copyIn({ path: source.descriptorPath, sourceOffsetBytes: offsetBytes, offsetBytes, lengthBytes })
      offsetBytes += lengthBytes
      context.report(offsetBytes, virtualSizeBytes)
    }
    await source.requireUnchanged()
  }
  context.checkInterrupted()
  await options.targets.finish(context.subject, virtualSizeBytes)
  return { imageId: context.subject, sizeBytes: virtualSizeBytes }
}
