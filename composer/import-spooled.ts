/** The second half of an import whose content arrived first: inspects what lies in the spool and makes the image of it. */
import type { ImportTarget } from '@atoll/mapper'
import type { JsonObject } from '@atoll/core'
import { requireQemuImg } from './convert-sandbox.ts'
import type { ImageFormat } from './image-format.ts'
import { planImage } from './image-inspect.ts'
import { ImageSource } from './image-source.ts'
import { convertSource, type ConvertOptions } from './import-convert.ts'
import { copyStepBytesDefault } from './import-raw.ts'
import type { Spool } from './import-spool.ts'
import type { JobContext } from './job-kind.ts'

export interface SpooledOptions extends ConvertOptions {
  spool: Spool
}

export interface SpooledImport {
  target: ImportTarget
  /** undefined: told by the content. */
  format: ImageFormat | undefined
  /** What arrived is called this in messages. */
  name: string
  /** Whether an interrupted attempt may have written into the target. */
  begunBefore: boolean
}

/** @throws AtollError as `planImage` and `convertSource`; JobInterrupted */
export async function storeSpooled(context: JobContext, options: SpooledOptions, spooled: SpooledImport): Promise<JsonObject> {
  const { target } = spooled
  const source = await ImageSource.open(options.spool.pathOf(context.subject))
  try {
    const plan = await planImage(source, spooled.format, spooled.name, context.signal)
    const { virtualSizeBytes } = plan
    if (spooled.begunBefore) await target.device.writeZeroes(0, virtualSizeBytes)
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
    }
    context.checkInterrupted()
    await options.targets.finish(context.subject, virtualSizeBytes)
    await options.spool.remove(context.subject)
    return { imageId: context.subject, sizeBytes: virtualSizeBytes }
  } finally {
    await source.close()
  }
}
