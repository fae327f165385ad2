import { expect, test } from 'vitest'
import { assert, AtollError, isAtollError, NoSpaceError, toAtollError } from './errors.ts'

test('an error has the status and the retry answer of its catalogue entry, unless it says otherwise', () => {
  const cause = new Error('below')
  const error = new AtollError('POOL_LOCKED', 'it is locked', { values: { owner: 'pid 1' }, cause })
  expect(error).toMatchObject({
    code: 'POOL_LOCKED',
    retryable: true,
    httpStatus: 409,
    values: { owner: 'pid 1' },
    name: 'AtollError',
  })
  expect(error.cause).toBe(cause)
  expect(new AtollError('POOL_LOCKED', 'x', { retryable: false }).retryable).toBe(false)
})

test('an error survives the way through another process as data', () => {
  const error = new AtollError('NAME_AMBIGUOUS', 'two of them', { values: { ids: ['a', 'b'] } })
  const copy = AtollError.fromData(JSON.parse(JSON.stringify(error.toData())))
  expect(copy).toMatchObject({ code: 'NAME_AMBIGUOUS', message: 'two of them', values: { ids: ['a', 'b'] } })
})

test('a full disk comes back as the class that callers look for', () => {
  const error = AtollError.fromData({ code: 'NO_SPACE', message: 'full' })
  expect(error).toBeInstanceOf(NoSpaceError)
  expect(error.httpStatus).toBe(507)
})

test('an unknown code becomes INTERNAL and keeps the code it came with', () => {
  const error = AtollError.fromData({ code: 'toString', message: 'odd' })
  expect(error).toMatchObject({ code: 'INTERNAL', values: { unknownCode: 'toString' } })
})

test('whatever is thrown can be made an error of ours', () => {
  const ours = new AtollError('INTERNAL', 'x')
  expect(toAtollError(ours)).toBe(ours)
  const foreign = new TypeError('no')
  expect(toAtollError(foreign)).toMatchObject({ code: 'INTERNAL', message: 'no', cause: foreign })
  expect(toAtollError('text').message).toBe('text')
  expect(isAtollError(ours, 'INTERNAL')).toBe(true)
  expect(isAtollError(ours, 'NO_SPACE')).toBe(false)
  expect(isAtollError(foreign)).toBe(false)
})

test('a broken assertion is a defect of ours', () => {
  expect(() => assert(false, 'two is two')).toThrow(expect.objectContaining({ code: 'INTERNAL' }))
  expect(() => assert(true, 'fine')).not.toThrow()
})
