import { expect, test } from 'vitest'
import { checkDrivers, drivers } from './drivers.ts'
import { memoryDriver } from './memory/memory-driver.ts'

test('the drivers have names of their own', () => {
  expect(drivers.map(({ name }) => name)).toEqual(['file', 'memory', 'ceph'])
})

test('a duplicate name stops the start', () => {
  expect(() => checkDrivers([...drivers, { ...memoryDriver }])).toThrow(
    expect.objectContaining({ code: 'DRIVER_DUPLICATE', values: { driver: 'memory' } }),
  )
})
