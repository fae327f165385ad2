import { AtollError, volumeSizeMaxBytes } from '@atoll/core'

/** Checks the size of an image, which need not be a multiple of anything. @throws AtollError SIZE_INVALID */
export function checkImageSize(sizeBytes: number): void {
  if (Number.isSafeInteger(sizeBytes) && sizeBytes >= 1 && sizeBytes <= volumeSizeMaxBytes) return
  throw new AtollError(
    'SIZE_INVALID',
    `an image of ${sizeBytes} bytes is out of range: 1 to ${volumeSizeMaxBytes} bytes (512 TiB)`,
    {
      values: { sizeBytes, minBytes: 1, maxBytes: volumeSizeMaxBytes },
    },
  )
}
