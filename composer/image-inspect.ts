/** Finds out what a source is and how its content becomes an image, before anything is made and before qemu-img sees it. */
import type { ImageFormat } from './image-format.ts'
import { detectFormat, magicHeadBytes, magicTailBytes, requireSupported } from './image-format.ts'
import { inspectVdi } from './image-inspect-vdi.ts'
import { inspectVhd } from './image-inspect-vhd.ts'
import { inspectVhdx } from './image-inspect-vhdx.ts'
import { inspectVmdk } from './image-inspect-vmdk.ts'
import type { ByteSource, Inspected } from './image-metadata.ts'
import { checkImageSize } from './image-size.ts'
import { inspectQcow2 } from './qcow2-inspect.ts'

/** Formats that qemu-img converts. */
export type ForeignFormat = Exclude<ImageFormat, 'raw'>

/** How the content of a source becomes an image. */
export type ImagePlan =
  /** The image is the first `virtualSizeBytes` of the source. */
  | { how: 'copy'; virtualSizeBytes: number }
  | { how: 'convert'; format: ForeignFormat; virtualSizeBytes: number; allocatedBytes: number }

const inspections: Readonly<Record<ForeignFormat, (source: ByteSource, signal?: AbortSignal) => Promise<Inspected>>> = {
  qcow2: inspectQcow2,
  vmdk: inspectVmdk,
  vdi: inspectVdi,
  vhdx: inspectVhdx,
  vhd: inspectVhd,
}

/**
 * Plans an import. Content that is said to be raw is never looked at; without `format` the magic tells, never a name.
 * @param name of the source, for messages
 * @throws AtollError IMAGE_FORMAT_UNSUPPORTED, IMAGE_CORRUPT, IMAGE_ENCRYPTED, IMAGE_HAS_BACKING_FILE, IMAGE_HAS_DATA_FILE,
 *   IMAGE_FEATURE_UNSUPPORTED, SIZE_INVALID
 */
export async function planImage(
  source: ByteSource,
  format: ImageFormat | undefined,
  name: string,
  signal?: AbortSignal,
): Promise<ImagePlan> {
  const found = format ?? requireSupported(await formatOf(source), name)
  if (found === 'raw') {
    checkImageSize(source.sizeBytes)
    return { how: 'copy', virtualSizeBytes: source.sizeBytes }
  }
  const inspected = await inspections[found](source, signal)
  if ('isFixed' in inspected && inspected.isFixed === true) return { how: 'copy', virtualSizeBytes: inspected.virtualSizeBytes }
  const { virtualSizeBytes, allocatedBytes } = inspected
  return { how: 'convert', format: found, virtualSizeBytes, allocatedBytes }
}

async function formatOf(source: ByteSource): Promise<string> {
  const tailBytes = Math.min(magicTailBytes, source.sizeBytes)
  const head = await source.read(0, Math.min(magicHeadBytes, source.sizeBytes))
  return detectFormat(head, await source.read(source.sizeBytes - tailBytes, tailBytes))
}
