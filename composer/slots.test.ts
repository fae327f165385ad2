import { expect, test } from 'vitest'
import { Slots } from './slots.ts'

test('as many run as there are slots, the others wait in their order, and one too many is refused', async () => {
  const slots = new Slots(2, 2)
  const started: number[] = []
  const gates = Array.from({ length: 5 }, () => Promise.withResolvers<void>())
  const run = (index: number): Promise<void> =>
    slots.run(async () => {
      started.push(index)
      await gates[index]?.promise
    })
  const first = [run(0), run(1), run(2), run(3)]
  await expect(run(4)).rejects.toMatchObject({ code: 'LIMIT_REACHED' })
  expect(started).toEqual([0, 1])
  gates[1]?.reject(new Error('failed'))
  await expect(first[1]).rejects.toThrow('failed')
  expect(started).toEqual([0, 1, 2])
  for (const gate of gates) gate.resolve()
  await Promise.all([first[0], first[2], first[3]])
  expect(started).toEqual([0, 1, 2, 3])
  await slots.run(async () => undefined)
})
