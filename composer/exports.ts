/**
 * The table that northbound reads: what can be connected to right now, and who is.
 *
 * Rules:
 * - An export is in the table exactly while an attachment of its resource exists and the device is open or being opened again.
 * - A suspended export (its device is poisoned or not open yet) shows in no list and takes no client; its name stays known.
 * - A connection is in `connections` from `enter` to `leave`; its device is not closed before it has left, or was closed and
 *   did not leave within `leaveTimeoutMs`.
 */
import { AtollError, type Logger } from '@atoll/core'
import type { Device } from '@atoll/native'
import type { EarlierStates } from './earlier-states.ts'
import { settledWithin, type SetTimer } from './timers.ts'

/** Requests in flight get this long to finish when clients are disconnected. */
export const drainTimeoutMs = 10_000
/** A closed connection gets this long to leave. */
export const leaveTimeoutMs = 10_000
/** At most this many connections of one export at a time. */
export const connectionsPerExportMax = 256

/** What the table needs of a connection; the native `Connection` is one. */
export interface ExportConnection {
  readonly peer: string
  /** Takes no more requests, finishes those in flight, answers later ones ESHUTDOWN, closes. */
  drain(): Promise<void>
  /** Closes at once. Idempotent. */
  close(): Promise<void>
}

/** An export that clients can use. `sizeBytes` follows a grow; a client learns of it when it connects again. */
export interface ExportEntry {
  /** The name that clients ask for. */
  readonly id: string
  readonly resourceId: string
  /** Name of the resource, for people. */
  readonly name: string
  readonly description: string
  readonly device: Device
  readonly readOnly: boolean
  readonly sizeBytes: number
  /** What it can be compared with. */
  readonly changes?: EarlierStates
  readonly connections: ReadonlySet<ExportConnection>
}

export interface ExportDefinition {
  id: string
  resourceId: string
  name: string
  description: string
  readOnly: boolean
  changes?: EarlierStates
}

class Export implements ExportEntry {
  readonly definition: ExportDefinition
  readonly connections = new Set<ExportConnection>()
  /** null: suspended. */
  openDevice: Device | null
  /** Called when the last connection left. */
  emptied: (() => void) | null = null

  constructor(definition: ExportDefinition, device: Device | null) {
    this.definition = definition
    this.openDevice = device
  }

  get id(): string {
    return this.definition.id
  }
  get resourceId(): string {
    return this.definition.resourceId
  }
  get name(): string {
    return this.definition.name
  }
  get description(): string {
    return this.definition.description
  }
  get readOnly(): boolean {
    return this.definition.readOnly
  }
  get changes(): EarlierStates | undefined {
    return this.definition.changes
  }
  get device(): Device {
    if (this.openDevice === null) throw gone(this.id)
    return this.openDevice
  }
  get sizeBytes(): number {
    return this.device.sizeBytes()
  }
}

export class Exports {
  private readonly log: Logger
  private readonly setTimer: SetTimer
  private readonly table = new Map<string, Export>()

  constructor(options: { log: Logger; setTimer: SetTimer }) {
    this.log = options.log
    this.setTimer = options.setTimer
  }

  /** The export of this name; null if there is none or it takes no client now. */
  get(id: string): ExportEntry | null {
    const found = this.table.get(id)
    return found === undefined || found.openDevice === null ? null : found
  }

  /** Whether there is an export of this name that takes no client now, but will again. */
  isSuspended(id: string): boolean {
    return this.table.get(id)?.openDevice === null
  }

  /** Every export that takes clients, by id. */
  list(): ExportEntry[] {
    return [...this.table.values()].filter(({ openDevice }) => openDevice !== null).toSorted((a, b) => (a.id < b.id ? -1 : 1))
  }

  /**
   * Enters a connection that is about to serve `entry`, and keeps the device open for it until `leave`.
   * @throws AtollError EXPORT_GONE if it was withdrawn or its device replaced since `get`; LIMIT_REACHED with too many
   */
  enter(entry: ExportEntry, connection: ExportConnection): void {
    const found = this.table.get(entry.id)
    if (found === undefined || found !== entry || found.openDevice === null) throw gone(entry.id)
    if (found.connections.size >= connectionsPerExportMax) {
      throw new AtollError('LIMIT_REACHED', `export ${entry.id} has ${connectionsPerExportMax} connections already`, {
        values: { export: entry.id, limit: connectionsPerExportMax },
      })
    }
    found.connections.add(connection)
  }

  /** Ends what `enter` began. A connection that is not there is no error. */
  leave(entry: ExportEntry, connection: ExportConnection): void {
    // The entry is ours and may be out of the table already: its connections are still counted.
    const found = entry as Export
    if (found.connections.delete(connection) && found.connections.size === 0) found.emptied?.()
  }

  /** Number of connections of all exports of a resource. */
  connectionCount(resourceId: string): number {
    return this.ofResource(resourceId).reduce((count, { connections }) => count + connections.size, 0)
  }

  /** Puts an export into the table; with a device it takes clients at once. */
  publish(definition: ExportDefinition, device: Device | null): void {
    if (this.table.has(definition.id)) throw new AtollError('INTERNAL', `export ${definition.id} is there already`)
    this.table.set(definition.id, new Export(definition, device))
  }

  /** New clients of the resource are refused until `resume`. */
  suspend(resourceId: string): void {
    for (const entry of this.ofResource(resourceId)) entry.openDevice = null
  }

  /** Takes clients again, on this device. */
  resume(resourceId: string, device: Device): void {
    for (const entry of this.ofResource(resourceId)) entry.openDevice = device
  }

  /** The resource was given another name. */
  rename(resourceId: string, name: string, description: string): void {
    for (const entry of this.ofResource(resourceId)) Object.assign(entry.definition, { name, description })
  }

  /** Takes an export out of the table. Disconnect its clients first. */
  withdraw(id: string): void {
    this.table.delete(id)
  }

  /**
   * Disconnects every client of the resource and returns when none is left. `drain`: requests in flight are finished first,
   * for at most `drainTimeoutMs`. Suspend the exports before, or new clients come meanwhile.
   */
  async disconnect(resourceId: string, how: 'drain' | 'close'): Promise<void> {
    await Promise.all(this.ofResource(resourceId).map((entry) => this.disconnectOne(entry, how)))
  }

  private async disconnectOne(entry: Export, how: 'drain' | 'close'): Promise<void> {
    const left = this.untilEmpty(entry)
    const end = async (connection: ExportConnection): Promise<void> => {
      try {
        if (how === 'drain' && !(await settledWithin(this.setTimer, connection.drain(), drainTimeoutMs))) {
          this.log.warn(
            { export: entry.id, peer: connection.peer },
            'requests in flight did not finish in time; the client is cut off',
          )
        }
        await connection.close()
      } catch (error) {
        this.log.warn({ err: error, export: entry.id, peer: connection.peer }, 'a client could not be disconnected cleanly')
      }
    }
    await Promise.all([...entry.connections].map(end))
    if (!(await settledWithin(this.setTimer, left, leaveTimeoutMs))) {
      this.log.error(
        { export: entry.id, connections: entry.connections.size },
        'closed connections did not leave their export in time',
      )
      entry.connections.clear()
    }
  }

  private untilEmpty(entry: Export): Promise<void> {
    if (entry.connections.size === 0) return Promise.resolve()
    return new Promise((resolve) => {
      const before = entry.emptied
      entry.emptied = () => {
        entry.emptied = null
        before?.()
        resolve()
      }
    })
  }

  private ofResource(resourceId: string): Export[] {
    return [...this.table.values()].filter((entry) => entry.resourceId === resourceId)
  }
}

function gone(id: string): AtollError {
  return new AtollError('EXPORT_GONE', `export ${id} is being detached or opened again`, { values: { export: id } })
}
