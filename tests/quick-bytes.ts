/** Loaded before every test file: bytes are compared as bytes. Vitest compares element by element, a second for every 2 MiB. */
import { expect } from 'vitest'

expect.addEqualityTesters([
  (found: unknown, wanted: unknown): boolean | undefined =>
    Buffer.isBuffer(found) && Buffer.isBuffer(wanted) ? found.equals(wanted) : undefined,
])
