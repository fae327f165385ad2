/** Options of the memory driver; README.md has the table. */
import { z } from 'zod'
import { checkOptions } from '../driver-options.ts'
import { sizeOption } from '../size-option.ts'

export const memoryCapacityBytesDefault = 2 ** 30
const capacityBytesMax = 2 ** 40

const memoryOptions = z.strictObject({
  capacity: sizeOption({ minBytes: 4096, maxBytes: capacityBytesMax }).optional(),
})

export interface MemoryConfig {
  capacityBytes: number
}

/** @throws AtollError POOL_OPTION_INVALID */
export function parseMemoryConfig(options: Readonly<Record<string, string>>): MemoryConfig {
  const { capacity } = checkOptions('memory', memoryOptions, options)
  return { capacityBytes: capacity ?? memoryCapacityBytesDefault }
}
