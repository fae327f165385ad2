import { parseSize } from '@atoll/core'
import { z } from 'zod'

/** An option that is a size (`512M`, `10G`), as bytes. */
export function sizeOption({ minBytes, maxBytes }: { minBytes: number; maxBytes: number }) {
  return z.string().transform((text, context) => {
    let bytes: number
    try {
      bytes = parseSize(text)
    } catch (error) {
      context.addIssue({ code: 'custom', message: (error as Error).message })
      return z.NEVER
    }
    if (bytes >= minBytes && bytes <= maxBytes) return bytes
    context.addIssue({ code: 'custom', message: `must be ${minBytes} to ${maxBytes} bytes` })
    return z.NEVER
  })
}
