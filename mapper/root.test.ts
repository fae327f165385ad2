import { describe, expect, it } from 'vitest'
import { rootMayReferTo, uniformRoot } from './root.ts'

describe('root words', () => {
  it('say of a map of holes that it refers to nothing', () => {
    expect(rootMayReferTo({ word: 0n, crc: 0 }, 7)).toBe(false)
  })

  it('say of a uniform map that it refers to its one layer', () => {
    expect(rootMayReferTo(uniformRoot(7), 7)).toBe(true)
    expect(rootMayReferTo(uniformRoot(7), 8)).toBe(false)
    expect(rootMayReferTo(uniformRoot(2 ** 32 - 1), 2 ** 32 - 1)).toBe(true)
  })

  it('say of a tree that it may refer to anything', () => {
    expect(rootMayReferTo({ word: (2n << 60n) | 5n, crc: 1 }, 7)).toBe(true)
  })

  it('are refused if they are of no known form', () => {
    expect(() => rootMayReferTo({ word: 3n << 60n, crc: 0 }, 7)).toThrow(expect.objectContaining({ code: 'PAGE_CORRUPT' }))
  })
})
