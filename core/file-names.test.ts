import { expect, test } from 'vitest'
import { checkContainerName, checkContentType, checkFileName, checkMetadata, parseFilePath } from './file-names.ts'

const euro = '€'

test.each(['a', ' ', '.', '..', '-x', 'a@b', 'line\nfeed', 'x'.repeat(256), `${euro.repeat(85)}x`, 'image:x', '\u{10ffff}'])(
  'the container name %j is allowed',
  (name) => {
    expect(() => checkContainerName(name)).not.toThrow()
  },
)

test.each(['', 'a/b', '/', 'x'.repeat(257), `${euro.repeat(85)}xx`, 'a\0', '\ud800', 'a\udc00b'])(
  'the container name %j is refused',
  (name) => {
    expect(() => checkContainerName(name)).toThrow(expect.objectContaining({ code: 'NAME_INVALID' }))
  },
)

test('a file name has 1 to 1024 bytes of UTF-8, of which only NUL and half characters are refused', () => {
  for (const name of ['a', '/', 'a//b/', '../..', '\u0001', 'x'.repeat(1024), euro.repeat(341)]) {
    expect(() => checkFileName(name), name).not.toThrow()
  }
  for (const name of ['', 'x'.repeat(1025), euro.repeat(342), 'a\0b', '\udfff']) {
    expect(() => checkFileName(name), name).toThrow(expect.objectContaining({ code: 'NAME_INVALID' }))
  }
})

test('the first slash parts the container from the file', () => {
  expect(parseFilePath('c/a/b')).toEqual({ container: 'c', name: 'a/b' })
  expect(parseFilePath('c//')).toEqual({ container: 'c', name: '/' })
  for (const text of ['', 'c', 'c/', '/n', '/']) {
    expect(() => parseFilePath(text), text).toThrow(expect.objectContaining({ code: 'NAME_INVALID' }))
  }
})

test('metadata is refused above each of its limits and allowed at it', () => {
  const items = (count: number, key: (index: number) => string, value: string) =>
    Object.fromEntries(Array.from({ length: count }, (_, index) => [key(index), value]))
  const key = (index: number) => `k${String(index).padStart(3, '0')}`
  for (const allowed of [{}, items(90, key, ''), { ['k'.repeat(128)]: 'v'.repeat(256) }, items(15, key, 'v'.repeat(256))]) {
    expect(() => checkMetadata(allowed)).not.toThrow()
  }
  const total = { ...items(15, key, 'v'.repeat(256)), last: 'v'.repeat(192) }
  expect(() => checkMetadata(total)).not.toThrow()
  const refused: Record<string, string>[] = [
    items(91, key, ''),
    { ['k'.repeat(129)]: '' },
    { k: 'v'.repeat(257) },
    { ...total, last: 'v'.repeat(193) },
    { '': 'v' },
    { k: '\0' },
    { '\ud800': '' },
  ]
  for (const metadata of refused) {
    expect(() => checkMetadata(metadata)).toThrow(expect.objectContaining({ code: 'METADATA_INVALID' }))
  }
})

test('a content type is printable ASCII', () => {
  for (const type of ['text/plain; charset=utf-8', 'x'.repeat(255)]) expect(() => checkContentType(type)).not.toThrow()
  for (const type of ['', 'x'.repeat(256), 'a\nb', 'tëxt']) {
    expect(() => checkContentType(type)).toThrow(expect.objectContaining({ code: 'METADATA_INVALID' }))
  }
})
