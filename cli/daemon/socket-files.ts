// The unix sockets of a home: their paths, what an earlier daemon left of them, and who may use them.
import { execFile } from 'node:child_process'
import { lstat, unlink } from 'node:fs/promises'
import { promisify } from 'node:util'
import { AtollError } from '@atoll/core'

/** sun_path of unix(7) has 108 bytes, one of them the closing zero. */
const socketPathBytesMax = 107

/**
 * Checks that a socket can have this path.
 * @throws AtollError CONFIG_INVALID
 */
export function checkSocketPath(path: string): void {
  const lengthBytes = Buffer.byteLength(path)
  if (lengthBytes > socketPathBytesMax) {
    throw new AtollError(
      'CONFIG_INVALID',
      `the socket ${path} would have a path of ${lengthBytes} bytes and the limit is ${socketPathBytesMax}: choose a shorter --home`,
      { values: { path, lengthBytes, limitBytes: socketPathBytesMax } },
    )
  }
}

/**
 * Removes a socket that nobody listens on. Call it only while the home's lock is held: whoever listened is gone then.
 * @throws AtollError CONFIG_INVALID if something else than a socket is in the way
 */
export async function removeStaleSocket(path: string): Promise<void> {
  try {
    const stat = await lstat(path)
    if (!stat.isSocket()) {
      throw new AtollError('CONFIG_INVALID', `${path} is in the way and is no socket: move it elsewhere`, { values: { path } })
    }
    await unlink(path)
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error
  }
}

/**
 * The number of a group, by name or number.
 * @throws AtollError CONFIG_INVALID if there is no such group
 */
export async function findGroupId(group: string): Promise<number> {
  if (/^\d{1,9}$/.test(group)) return Number(group)
  try {
    // getent asks every source that the machine is set up for, not only /etc/group.
    const { stdout } = await promisify(execFile)('getent', ['group', '--', group])
    const id = Number(stdout.split(':')[2])
    if (Number.isInteger(id)) return id
  } catch {
    // Falls through: getent ends with 2 when there is no such group.
  }
  throw new AtollError('CONFIG_INVALID', `--socket-group ${group}: there is no such group on this machine`, { values: { group } })
}
