import { expect, test } from 'vitest'
import { formatBytes, formatSeconds } from './format-bytes.ts'

test('bytes are shown in the largest unit below them, with one digit at most', () => {
  expect([0, 1, 1023, 1024, 1536, 2 ** 30, 10 * 2 ** 40, 512 * 2 ** 40].map(formatBytes)).toEqual([
    '0 B',
    '1 B',
    '1023 B',
    '1 KiB',
    '1.5 KiB',
    '1 GiB',
    '10 TiB',
    '512 TiB',
  ])
  expect(formatBytes(1024 * 1.06)).toBe('1.1 KiB')
})

test('durations are shown in the two largest units', () => {
  expect([0, 59.4, 60, 200, 3600, 7500].map(formatSeconds)).toEqual([
    '0 s',
    '59 s',
    '1 min 0 s',
    '3 min 20 s',
    '1 h 0 min',
    '2 h 5 min',
  ])
})
