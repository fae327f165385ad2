import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { checkVolumeSize, formatSize, parseSize, roundUp } from './size.ts'

describe('parseSize', () => {
  test.each([
    ['0', 0],
    ['4096', 4096],
    ['4096B', 4096],
    ['1K', 1024],
    ['512M', 512 * 2 ** 20],
    ['512 MiB', 512 * 2 ** 20],
    ['10G', 10 * 2 ** 30],
    ['10g', 10 * 2 ** 30],
    ['1.5T', 1.5 * 2 ** 40],
    ['0.25K', 256],
    ['2P', 2 * 2 ** 50],
    [' 7M ', 7 * 2 ** 20],
  ])('reads %s', (text, bytes) => {
    expect(parseSize(text)).toBe(bytes)
  })

  test.each([
    '',
    '-1',
    '+1',
    '1.5',
    'G',
    '10X',
    '10GB',
    '1e3',
    '0x10',
    '1,5G',
    '1.G',
    '.5G',
    '1 0G',
    '99999999999999999',
    '9P0',
    '9999P',
    '0.1K',
  ])('refuses %j and says what it was', (text) => {
    expect(() => parseSize(text)).toThrow(expect.objectContaining({ code: 'SIZE_INVALID', values: { size: text } }))
  })

  test('bytes come back as they were', () => {
    fc.assert(fc.property(fc.integer({ min: 0, max: Number.MAX_SAFE_INTEGER }), (bytes) => parseSize(String(bytes)) === bytes))
  })
})

test('sizes are shown with at most two digits after the point', () => {
  const shown = [0, 512, 1023, 1024, 1536, 10 * 2 ** 30, 2 ** 40 - 1, 1.126 * 2 ** 40, 2 ** 49].map((bytes) => formatSize(bytes))
  expect(shown).toEqual(['0 B', '512 B', '1023 B', '1 KiB', '1.5 KiB', '10 GiB', '1 TiB', '1.13 TiB', '512 TiB'])
})

test('a volume has a multiple of 4096 bytes, from 4096 to 512 TiB', () => {
  for (const sizeBytes of [4096, 8192, 2 ** 49]) expect(() => checkVolumeSize(sizeBytes)).not.toThrow()
  for (const sizeBytes of [0, -4096, 4095, 4097, 2 ** 49 + 4096, Number.NaN, 4096.5]) {
    expect(() => checkVolumeSize(sizeBytes)).toThrow(expect.objectContaining({ code: 'SIZE_INVALID' }))
  }
  expect(() => checkVolumeSize(5000)).toThrow('use 8192')
})

test('rounding up is exact over the whole address space', () => {
  expect([roundUp(0, 4096), roundUp(1, 4096), roundUp(4096, 4096), roundUp(2 ** 49 - 1, 4096)]).toEqual([0, 4096, 4096, 2 ** 49])
})
