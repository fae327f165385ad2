import { expect, test } from 'vitest'
import { isId, newId, parseId } from './ids.ts'

test('a new id is an id, and another one each time', () => {
  const ids = Array.from({ length: 100 }, () => newId())
  expect(ids.every((id) => isId(id))).toBe(true)
  expect(new Set(ids).size).toBe(100)
})

test('an id is read in any case and written in lower case', () => {
  expect(parseId('123E4567-E89B-42D3-A456-426614174000')).toBe('123e4567-e89b-42d3-a456-426614174000')
  for (const text of ['', 'x', '123e4567e89b42d3a456426614174000', '123e4567-e89b-42d3-a456-42661417400g']) {
    expect(() => parseId(text)).toThrow(expect.objectContaining({ code: 'ID_INVALID', values: { id: text } }))
  }
})
