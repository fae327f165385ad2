import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { IntervalCover } from './interval-cover.ts'

describe('the cover of an interval', () => {
  it('agrees with a byte array on what overlaps and what is complete', () => {
    fc.assert(
      fc.property(
        fc.integer({ min: 0, max: 40 }),
        fc.array(fc.tuple(fc.integer({ min: -5, max: 45 }), fc.integer({ min: 0, max: 12 })), { maxLength: 40 }),
        (length, pieces) => {
          const cover = new IntervalCover(length, 1000)
          const bytes = new Uint8Array(length)
          for (const [start, size] of pieces) {
            let expected: string = 'added'
            if (size === 0) expected = 'empty'
            else if (start < 0 || start + size > length) expected = 'outside'
            else if (bytes.subarray(start, start + size).includes(1)) expected = 'overlap'
            else bytes.fill(1, start, start + size)
            expect(cover.add(start, size)).toBe(expected)
            expect(cover.complete).toBe(!bytes.includes(0))
          }
        },
      ),
    )
  })
  it('holds no more pieces than its bound', () => {
    const cover = new IntervalCover(100, 3)
    expect([0, 10, 20, 30].map((start) => cover.add(start, 1))).toEqual(['added', 'added', 'added', 'too-many'])
    expect(cover.add(1, 9)).toBe('added')
  })
})
