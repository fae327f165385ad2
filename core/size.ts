/**
 * Sizes as people type and read them. A letter is a power of 1024: `10G` is 10 GiB. `10GiB` means the same; `10GB` is
 * refused, because half of its readers mean 10^9.
 */
import { AtollError } from './errors.ts'

const unitBytes: Readonly<Record<string, number>> = { '': 1, K: 2 ** 10, M: 2 ** 20, G: 2 ** 30, T: 2 ** 40, P: 2 ** 50 }
const sizePattern = /^(\d{1,16})(?:\.(\d{1,9}))?\s*(?:([KMGTP])(?:iB)?|B)?$/i

/** Sizes of volumes are multiples of this. */
export const volumeSizeUnitBytes = 4096
/** The address space of a map. */
export const volumeSizeMaxBytes = 512 * 2 ** 40

/**
 * Bytes of a size such as `4096`, `512M`, `10G`, `1.5T`; `1.5` without a unit and a fraction that is no whole number of
 * bytes are refused.
 * @throws AtollError SIZE_INVALID with the text
 */
export function parseSize(text: string): number {
  const match = sizePattern.exec(text.trim())
  const refuse = (why: string): AtollError =>
    new AtollError('SIZE_INVALID', `size "${text}" ${why}: pass bytes, or a number with K, M, G, T or P (powers of 1024)`, {
      values: { size: text },
    })
  if (match === null) throw refuse('cannot be read')
  const [, whole, fraction, unit] = match
  const unitSize = unitBytes[(unit ?? '').toUpperCase()] ?? 1
  if (fraction !== undefined && unitSize === 1) throw refuse('has a fraction of a byte')
  let bytes = Number(whole) * unitSize
  if (fraction !== undefined) {
    // Exact in integers: fraction/10^n of a power of two is rarely whole, and a rounded size would surprise.
    const scaled = BigInt(fraction) * BigInt(unitSize)
    const divisor = 10n ** BigInt(fraction.length)
    if (scaled % divisor !== 0n) throw refuse('is not a whole number of bytes')
    bytes += Number(scaled / divisor)
  }
  if (!Number.isSafeInteger(bytes)) throw refuse('is too large')
  return bytes
}

/**
 * Checks the size of a volume.
 * @throws AtollError SIZE_INVALID with the value and the limit
 */
export function checkVolumeSize(sizeBytes: number): void {
  if (!Number.isSafeInteger(sizeBytes) || sizeBytes < volumeSizeUnitBytes || sizeBytes > volumeSizeMaxBytes) {
    throw new AtollError(
      'SIZE_INVALID',
      `size ${sizeBytes} is out of range: a volume has ${volumeSizeUnitBytes} to ${volumeSizeMaxBytes} bytes (4 KiB to 512 TiB)`,
      { values: { sizeBytes, minBytes: volumeSizeUnitBytes, maxBytes: volumeSizeMaxBytes } },
    )
  }
  if (sizeBytes % volumeSizeUnitBytes !== 0) {
    throw new AtollError(
      'SIZE_INVALID',
      `size ${sizeBytes} is not a multiple of ${volumeSizeUnitBytes} bytes: use ${roundUp(sizeBytes, volumeSizeUnitBytes)}`,
      { values: { sizeBytes, unitBytes: volumeSizeUnitBytes } },
    )
  }
}

/** The smallest multiple of `unit` that is not below `value`. Both are safe integers, `unit` is positive. */
export function roundUp(value: number, unit: number): number {
  return Math.ceil(value / unit) * unit
}

/** `bytes` for people: `10 GiB`, `1.5 TiB`, `512 B`; at most two digits after the point. */
export function formatSize(bytes: number): string {
  const names = ['B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB']
  let index = 0
  let value = bytes
  // 1023.995 would be shown as "1024.00": go on to the next unit a little earlier.
  while (Math.abs(value) >= 1023.995 && index < names.length - 1) {
    value /= 1024
    index += 1
  }
  return `${index === 0 ? value : Number(value.toFixed(2))} ${names[index]}`
}
