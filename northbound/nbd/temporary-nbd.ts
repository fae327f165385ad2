import { join } from 'node:path'
import { silentLog, type Logger } from '@atoll/core'
import type { Device, Engine } from '@atoll/native'
import type { ExportTable, NbdExport } from './export-table.ts'
import { startNbdServer } from './nbd-server.ts'

/** A device that is served for a moment. */
export interface TemporaryExport {
  readonly name: string
  readonly device: Device
  readonly readOnly: boolean
}

export interface TemporaryNbdOptions {
  /** An existing folder for the socket. */
  readonly dir: string
  /** The group that may connect, too. */
  readonly groupId?: number
  /** Mode of the socket file. Default 0660 with a group, else 0600. */
  readonly mode?: number
  readonly log?: Logger
}

/** A server for a few devices on a unix socket of its own. */
export interface TemporaryNbd {
  readonly socketPath: string
  /** Disconnects everybody, waits until no device is in use any more and removes the socket. Idempotent. */
  close(): Promise<void>
}

let serverCount = 0

/**
 * Serves devices on a new unix socket in `dir`, for a program that is trusted with nothing else (qemu-img in a sandbox).
 * The devices stay the caller's: close the server before them.
 * @throws AtollError as `startNbdServer`
 */
export async function serveTemporaryNbd(
  engine: Pick<Engine, 'listenUnix' | 'listenTcp'>,
  exports: readonly TemporaryExport[],
  options: TemporaryNbdOptions,
): Promise<TemporaryNbd> {
  serverCount += 1
  const socketPath = join(options.dir, `nbd-${process.pid}-${serverCount}.sock`)
  const mode = options.mode ?? (options.groupId === undefined ? 0o600 : 0o660)
  const server = await startNbdServer({
    engine,
    exports: fixedExports(exports),
    log: options.log ?? silentLog(),
    listen: { path: socketPath, mode, groupId: options.groupId },
  })
  return { socketPath, close: () => server.close() }
}

/** A table that never changes. */
export function fixedExports(exports: readonly TemporaryExport[]): ExportTable {
  const entries: readonly NbdExport[] = exports.map(({ name, device, readOnly }) => ({
    id: name,
    name,
    description: '',
    device,
    readOnly,
  }))
  return {
    get: (name) => entries.find(({ id }) => id === name) ?? null,
    list: () => entries,
    enter: () => {},
    leave: () => {},
  }
}
