/** Sizes of resources that are not volumes, and their slots. */
import { AtollError, roundUp, volumeSizeMaxBytes, volumeSizeUnitBytes } from '@atoll/core'

/** Bytes of a slot, the unit of the map: a constant of the format. */
export const slotBytes = volumeSizeUnitBytes

/** The size rounded up to whole slots: what a device of it, or a volume made from it, has. */
export function roundUpToSlot(sizeBytes: number): number {
  return roundUp(sizeBytes, slotBytes)
}

/**
 * Checks the size of an image: any number of bytes from 1 to 512 TiB.
 * @throws AtollError SIZE_INVALID
 */
export function checkImageSize(sizeBytes: number): void {
  if (Number.isSafeInteger(sizeBytes) && sizeBytes >= 1 && sizeBytes <= volumeSizeMaxBytes) return
  throw new AtollError(
    'SIZE_INVALID',
    `size ${sizeBytes} is out of range: an image has 1 to ${volumeSizeMaxBytes} bytes (512 TiB)`,
    {
      values: { sizeBytes, minBytes: 1, maxBytes: volumeSizeMaxBytes },
    },
  )
}
