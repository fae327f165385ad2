import type { Device } from '@atoll/native'

/** A device that is served for a moment. */
export interface TemporaryExport {
  name: string
  device: Device
  readOnly: boolean
}

/** A server for a few devices on a unix socket of its own. */
export interface TemporaryNbd {
  readonly socketPath: string
  /** Disconnects everybody, waits until no device is in use any more and removes the socket. Idempotent. */
  close(): Promise<void>
}

/**
 * Serves the exports on a new socket in `dir`; handed in, because the composer speaks no protocol. With `groupId` the socket
 * belongs to that group and the group may connect; without, only our own user.
 */
export type ServeTemporaryNbd = (
  exports: readonly TemporaryExport[],
  options: { dir: string; groupId?: number },
) => Promise<TemporaryNbd>
