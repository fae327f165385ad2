import { expect, test } from 'vitest'
import { checkName, parseSnapshotName } from './names.ts'

test.each(['a', 'disk-1', 'Größe', 'my disk', 'x'.repeat(255), '💾'.repeat(255), 'a.b:c', '0'])(
  'the name %j is allowed',
  (name) => {
    expect(() => checkName('volume', name)).not.toThrow()
  },
)

test.each([
  '',
  'x'.repeat(256),
  'a/b',
  'a@b',
  'a\nb',
  'a\u0000',
  'a\u007f',
  'a\u202eb',
  'a\u200bb',
  '\ud800',
  ' a',
  'a ',
  '.',
  '..',
  '-',
  '-f',
  '123e4567-e89b-42d3-a456-426614174000',
  '123E4567-E89B-42D3-A456-426614174000',
])('the name %j is refused with its kind', (name) => {
  expect(() => checkName('snapshot', name)).toThrow(
    expect.objectContaining({ code: 'NAME_INVALID', values: { kind: 'snapshot', name } }),
  )
})

test('VOL@SNAP has two parts', () => {
  expect(parseSnapshotName('disk@monday')).toEqual({ volume: 'disk', snapshot: 'monday' })
  for (const text of ['disk', '@monday', 'disk@', 'a@b@c', '@', '']) {
    expect(() => parseSnapshotName(text)).toThrow(expect.objectContaining({ code: 'NAME_INVALID' }))
  }
})
