import { setImmediate as nextTurn } from 'node:timers/promises'
import { expect, test } from 'vitest'
import { eachInTurns, filterInTurns, inPieces, mapInTurns } from './turns.ts'

const numbers = Array.from({ length: 25_000 }, (_, index) => index)

/** Runs `fn`; how often the event loop turned meanwhile. */
async function turnsDuring(fn: () => Promise<unknown>): Promise<number> {
  let turns = 0
  let isOver = false
  const counting = (async () => {
    for (; !isOver; turns += 1) await nextTurn()
  })()
  await fn()
  isOver = true
  await counting
  return turns
}

test('rows are read in pieces by key, all of them and each once, however many a piece gives', async () => {
  const limits = new Set<number>()
  const read = async (after: number, limit: number): Promise<number[]> => {
    limits.add(limit)
    return numbers.slice(after + 1, after + 1 + limit)
  }
  expect(await inPieces(read, (row) => row, -1)).toEqual(numbers)
  const [limit] = limits
  expect(limits.size).toBe(1)
  expect(limit).toBeLessThan(numbers.length)
  const whole = numbers.slice(0, limit)
  expect(
    await inPieces(
      async (after) => whole.slice(after + 1),
      (row) => row,
      -1,
    ),
  ).toEqual(whole)
  expect(await inPieces(async () => [], String, '')).toEqual([])
})

test('others get their turn while very many items are gone through', async () => {
  const seen: number[] = []
  expect(await turnsDuring(async () => await eachInTurns(numbers, (number) => seen.push(number)))).toBeGreaterThan(1)
  expect(seen).toEqual(numbers)
  let even: number[] = []
  expect(
    await turnsDuring(async () => {
      even = await filterInTurns(numbers, (number) => number % 2 === 0)
    }),
  ).toBeGreaterThan(1)
  expect(even).toEqual(numbers.filter((number) => number % 2 === 0))
})

test('of several items with one key the last is found', async () => {
  const byDigit = await mapInTurns(numbers, (number) => number % 10)
  expect([...byDigit].toSorted()).toEqual(Array.from({ length: 10 }, (_, digit) => [digit, 24_990 + digit]))
})
