/** Options of the file driver; README.md has the table. */
import { isAbsolute, normalize } from 'node:path'
import { z } from 'zod'
import { reserveBytesMax } from '../driver.ts'
import { checkOptions } from '../driver-options.ts'
import { sizeOption } from '../size-option.ts'

export const fileReserveBytesDefault = 64 * 2 ** 20

const fileOptions = z.strictObject({
  path: z
    .string()
    .min(1, 'must not be empty')
    .refine((path) => isAbsolute(path), 'must be an absolute path')
    .refine((path) => !path.includes('\0'), 'must not contain a zero byte')
    .transform((path) => normalize(path)),
  reserve: sizeOption({ minBytes: 0, maxBytes: reserveBytesMax }).optional(),
})

export interface FileConfig {
  /** Absolute. */
  path: string
  reserveBytes: number
}

/** @throws AtollError POOL_OPTION_INVALID */
export function parseFileConfig(options: Readonly<Record<string, string>>): FileConfig {
  const { path, reserve } = checkOptions('file', fileOptions, options)
  return { path, reserveBytes: reserve ?? fileReserveBytesDefault }
}
