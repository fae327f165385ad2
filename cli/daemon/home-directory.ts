// The home of a daemon: a directory that only its user can enter, and the lock that keeps a second daemon out.
import { chmod, chown, mkdir } from 'node:fs/promises'
import { hostname } from 'node:os'
import { join } from 'node:path'
import { AtollError, takeProcessLock } from '@atoll/core'
import type { ProcessLock } from '@atoll/core'

/**
 * Makes the home if it is missing and sees to it that nobody else can enter it. Files made by this process are its user's
 * alone from here on, wherever they lie.
 * @throws AtollError CONFIG_INVALID if it cannot be made or used
 */
export async function prepareHome(home: string): Promise<void> {
  process.umask(0o077)
  try {
    await mkdir(home, { recursive: true })
    await chmod(home, 0o700)
  } catch (error) {
    throw new AtollError(
      'CONFIG_INVALID',
      `the home ${home} cannot be used: ${error instanceof Error ? error.message : String(error)}`,
      {
        values: { home },
        cause: error,
      },
    )
  }
}

/**
 * Lets a group pass through the home to the NBD socket. It can list nothing, and whatever else lies in the home is the
 * user's alone.
 * @throws AtollError CONFIG_INVALID if the group is not one of the user's
 */
export async function letGroupPass(home: string, groupId: number): Promise<void> {
  try {
    await chown(home, -1, groupId)
    await chmod(home, 0o710)
  } catch (error) {
    throw new AtollError(
      'CONFIG_INVALID',
      `the home ${home} cannot be given to group ${groupId}: ${error instanceof Error ? error.message : String(error)}`,
      {
        values: { home, groupId },
        cause: error,
      },
    )
  }
}

/**
 * Takes the home's lock, which the kernel drops when this process ends, however it ends.
 * @throws AtollError HOME_LOCKED naming the pid that has it
 */
export function lockHome(home: string): ProcessLock {
  const taken = takeProcessLock(join(home, 'daemon.lock'), `pid ${process.pid} on ${hostname()}`)
  if ('lock' in taken) return taken.lock
  const owner = taken.owner === '' ? 'another process' : taken.owner
  throw new AtollError('HOME_LOCKED', `${home} is served by ${owner} already: stop that daemon, or use another --home`, {
    values: { home, owner },
  })
}
