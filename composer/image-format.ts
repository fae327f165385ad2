/** Tells the format of a disk image by its magic. Only asked when nobody said that the content is raw. */
import { AtollError } from '@atoll/core'

/** The formats that can be imported. */
export const imageFormats = ['raw', 'qcow2', 'vmdk', 'vdi', 'vhdx', 'vhd'] as const

/** What an import is told about its source; undefined: look. */
export type ImageFormat = (typeof imageFormats)[number]

/** Bytes at the start that detection looks at. */
export const magicHeadBytes = 512
/** Bytes at the end that detection looks at: the footer of a fixed VHD. */
export const magicTailBytes = 512

const magics: readonly { format: string; offsetBytes: number; magic: string }[] = [
  { format: 'vmdk', offsetBytes: 0, magic: 'KDMV' },
  { format: 'vmdk', offsetBytes: 0, magic: 'COWD' },
  { format: 'vmdk', offsetBytes: 0, magic: '# Disk DescriptorFile' },
  { format: 'vdi', offsetBytes: 64, magic: '\x7f\x10\xda\xbe' },
  { format: 'vhdx', offsetBytes: 0, magic: 'vhdxfile' },
  { format: 'vhd', offsetBytes: 0, magic: 'conectix' },
  { format: 'qed', offsetBytes: 0, magic: 'QED\0' },
  { format: 'parallels', offsetBytes: 0, magic: 'WithoutFreeSpace' },
  { format: 'parallels', offsetBytes: 0, magic: 'WithouFreSpacExt' },
]
const qcowMagic = 'QFI\xfb'

/**
 * Names the format of an image whose first `magicHeadBytes` and last `magicTailBytes` bytes (fewer if it is shorter) are
 * given. What has no known magic is raw.
 */
export function detectFormat(head: Uint8Array, tail: Uint8Array): string {
  const start = Buffer.from(head).toString('latin1')
  if (start.startsWith(qcowMagic)) return head[7] === 1 && head[4] === 0 && head[5] === 0 && head[6] === 0 ? 'qcow' : 'qcow2'
  for (const { format, offsetBytes, magic } of magics) {
    if (start.startsWith(magic, offsetBytes)) return format
  }
  // A fixed VHD is raw data with a footer: taken as raw, the footer would become a part of the disk.
  return tail.length === magicTailBytes && Buffer.from(tail).toString('latin1').startsWith('conectix') ? 'vhd' : 'raw'
}

/** The detected format if it can be imported. @throws AtollError IMAGE_FORMAT_UNSUPPORTED naming it */
export function requireSupported(format: string, source: string): ImageFormat {
  const found = imageFormats.find((supported) => supported === format)
  if (found !== undefined) return found
  throw new AtollError(
    'IMAGE_FORMAT_UNSUPPORTED',
    `${source} looks like ${format}, which cannot be imported; ${imageFormats.join(', ')} can. If its content is raw all the same, say so with --format raw`,
    { values: { source, format } },
  )
}
