/** The drivers there are. Adding one is its folder and a line here. */
import { AtollError } from '@atoll/core'
import { cephDriver } from './ceph/ceph-driver.ts'
import type { Driver } from './driver.ts'
import { fileDriver } from './file/file-driver.ts'
import { memoryDriver } from './memory/memory-driver.ts'

/** The list as it is, or an error that stops the start. @throws AtollError DRIVER_DUPLICATE */
export function checkDrivers(list: readonly Driver[]): readonly Driver[] {
  const names = new Set<string>()
  for (const { name } of list) {
    if (names.has(name)) {
      throw new AtollError('DRIVER_DUPLICATE', `two drivers are called "${name}"`, { values: { driver: name } })
    }
    names.add(name)
  }
  return list
}

export const drivers: readonly Driver[] = checkDrivers([fileDriver, memoryDriver, cephDriver])
