import { expect, test } from 'vitest'
import { AtollError } from './errors.ts'
import { createLog, type LogLevel, redactUris } from './logging.ts'

function capture(level: LogLevel = 'info') {
  const lines: string[] = []
  return { lines, log: createLog({ level, write: (line) => lines.push(line) }) }
}

test('a line is one JSON object with time, level and pid', () => {
  const { lines, log } = capture()
  log.info({ volume: 'v' }, 'attached')
  log.debug('not shown')
  expect(lines).toHaveLength(1)
  expect(JSON.parse(lines[0] ?? '')).toMatchObject({ level: 30, pid: process.pid, volume: 'v', msg: 'attached' })
})

test('secrets are not written, wherever they stand', () => {
  const { lines, log } = capture()
  log.info({ password: 'hunter2', user: { token: 'hunter2', deep: { secret: 'hunter2' } } }, 'x')
  log.info({ uri: 'iscsi://user%hunter2@host:3260/iqn/0', list: ['http://me:hunter2@host/'] }, 'x')
  log.error(
    { err: new AtollError('IO_ERROR', 'cannot reach nbds://me:hunter2@host', { values: { uri: 'http://a:hunter2@b' } }) },
    'x',
  )
  expect(lines).toHaveLength(3)
  expect(lines.join('')).not.toContain('hunter2')
})

test('an error keeps its code, values and cause', () => {
  const { lines, log } = capture()
  log.error({ err: new AtollError('NO_SPACE', 'full', { values: { path: '/x' }, cause: new Error('ENOSPC') }) }, 'write failed')
  expect(JSON.parse(lines[0] ?? '')).toMatchObject({
    err: { code: 'NO_SPACE', message: 'full', values: { path: '/x' }, cause: { message: 'ENOSPC' } },
  })
})

test('addresses without a secret stay as they are', () => {
  const text = 'nbd+unix:///id?socket=/run/nbd.sock and nbd://host:10809/id and http://[::1]:8776/'
  expect(redactUris(text)).toBe(text)
})
