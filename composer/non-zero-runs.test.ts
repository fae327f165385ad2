import { expect, test } from 'vitest'
import { nonZeroRuns } from './non-zero-runs.ts'

test('blocks of zeros are left out and neighbours are one run', () => {
  const data = Buffer.alloc(5 * 4096 + 100)
  expect(nonZeroRuns(data)).toEqual([])
  data[4096] = 1
  data[3 * 4096 - 1] = 1
  data[5 * 4096 + 99] = 1
  expect(nonZeroRuns(data)).toEqual([
    { startBytes: 4096, endBytes: 3 * 4096 },
    { startBytes: 5 * 4096, endBytes: 5 * 4096 + 100 },
  ])
  expect(nonZeroRuns(Buffer.alloc(0))).toEqual([])
})
