import { expect, test } from 'vitest'
import { formatFields, formatTable } from './table.ts'

test('columns are as wide as their widest cell, numbers stand to the right', () => {
  expect(
    formatTable(
      ['name', 'layers', 'id'],
      [
        ['a', 7, 'x'],
        ['longer', 1234, null],
      ],
    ),
  ).toBe(['NAME    LAYERS  ID', 'a            7  x', 'longer    1234  -'].join('\n'))
})

test('an empty table is its header', () => {
  expect(formatTable(['name', 'id'], [])).toBe('NAME  ID')
})

test('values of fields are aligned', () => {
  expect(
    formatFields([
      ['id', 'x'],
      ['longer', null],
    ]),
  ).toBe('id:     x\nlonger: -')
})

test('an escape sequence in a name does not reach the terminal', () => {
  expect(formatTable(['name'], [['\u001b[31mred\u0007']])).toBe('NAME\n?[31mred?')
})
