/** The job that copies a raw file into an image, in steps, holes kept. */
import type { JsonObject } from '@atoll/core'
import { ImageSource, type SourceIdentity } from './image-source.ts'
import type { ImportTargets } from './import-targets.ts'
import type { JobContext, JobKind } from './job-kind.ts'

/** One native call copies this much: short enough to pause at, long enough not to be felt. */
export const copyStepBytesDefault = 64 * 2 ** 20
/** After so many steps what was copied is made durable, and the cursor saved. */
export const stepsPerSave = 4

export interface RawImportParams extends JsonObject {
  source: SourceIdentity
  /** The image is so much of the source's beginning: a fixed VHD ends with a footer. */
  sizeBytes: number
}

export function rawImportKind(targets: ImportTargets, copyStepBytes = copyStepBytesDefault): JobKind {
  return {
    kind: 'image-import-raw',
    pausable: true,
    parallelMax: 2,
    run: (context) => copyRaw(context, targets, copyStepBytes),
    discard: async ({ subject }) => targets.abort(subject),
  }
}

async function copyRaw(context: JobContext, targets: ImportTargets, copyStepBytes: number): Promise<JsonObject> {
  const { source: identity, sizeBytes } = context.params as RawImportParams
  const result = { imageId: context.subject, sizeBytes }
  const target = await targets.get(context.subject)
  // The job was stopped between the image's last commit and its own.
  if (target === null) return result
  const source = await ImageSource.openAgain(identity)
  try {
    let offsetBytes = Number(context.cursor?.['offsetBytes'] ?? 0)
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
      const step = { path: source.descriptorPath, sourceOffsetBytes: offsetBytes, offsetBytes, lengthBytes }
      // Whatever the copy says: a source that changed is the reason to name.
      await target.device.copyIn(step).finally(() => source.requireUnchanged())
      offsetBytes += lengthBytes
      context.report(offsetBytes, sizeBytes)
      if (offsetBytes - savedBytes >= stepsPerSave * copyStepBytes) await save()
    }
    await targets.finish(context.subject)
    return result
  } finally {
    await source.close()
  }
}
