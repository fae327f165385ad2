import { Writable } from 'node:stream'
import { expect, test } from 'vitest'
import { describeProgress, ProgressLine } from './progress.ts'

const gib = 2 ** 30

test('what is known is shown: percent, bytes, rate, time left', () => {
  expect(describeProgress({ progressBytes: gib, totalBytes: 4 * gib, rateBytesPerSecond: gib / 4, secondsLeft: 12 })).toBe(
    '25 %  1 GiB of 4 GiB  256 MiB/s  12 s left',
  )
  expect(describeProgress({ progressBytes: gib, totalBytes: null, rateBytesPerSecond: 0, secondsLeft: null })).toBe('1 GiB')
})

test('a terminal gets one line that is written over, anything else gets nothing', () => {
  const progress = { progressBytes: 1, totalBytes: 2, rateBytesPerSecond: 0, secondsLeft: null }
  const written = (isTTY: boolean): string => {
    let text = ''
    const write = (chunk: Buffer, _encoding: string, done: () => void): void => {
      text += chunk.toString()
      done()
    }
    const output = Object.assign(new Writable({ write }), { isTTY })
    const line = new ProgressLine('import', output)
    line.update(progress)
    line.update({ ...progress, progressBytes: 2 })
    line.end()
    return text
  }
  expect(written(true)).toBe('\r\u001b[Kimport  50 %  1 B of 2 B\r\u001b[Kimport  100 %  2 B of 2 B\n')
  expect(written(false)).toBe('')
})
