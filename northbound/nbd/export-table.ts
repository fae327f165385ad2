import type { Device, FrozenMap } from '@atoll/native'

/** What a client can connect to. */
export interface NbdExport {
  /** The name that clients ask for: the attachment's stable id. */
  readonly id: string
  /** Name of the resource, for people. */
  readonly name: string
  /** Shown by clients that list. At most 4096 bytes of it are sent. */
  readonly description: string
  readonly device: Device
  readonly readOnly: boolean
  /** Earlier states that changes can be counted from. Absent: there are none. */
  readonly changes?: EarlierStates
}

/** The snapshots that an export can be compared with. */
export interface EarlierStates {
  /** What `open` takes, for clients that list. */
  list(): Promise<readonly string[]>
  /** The map of that state, whole and in memory: it may be deleted afterwards. Null if there is none of this name. */
  open(name: string): Promise<FrozenMap | null>
}

/** A connection, as far as the owner of an export has to do with it. */
export interface ExportConnection {
  readonly peer: string
  /** Takes no more requests, finishes those in flight, answers later ones ESHUTDOWN, closes. Resolves when it has ended. */
  drain(): Promise<void>
  /** Closes at once. Idempotent. Resolves when nothing of it touches the device any more. */
  close(): Promise<void>
}

/** Who has what to offer: asked anew for every option, so that exports come and go while clients negotiate. */
export interface ExportTable {
  /** The export of this name, or null if there is none or it takes no client now. */
  get(name: string): NbdExport | null
  /** Whether there is such an export that takes no client now but will again. Clients are told to come back. */
  isSuspended?(name: string): boolean
  /** Every export that takes clients. */
  list(): readonly NbdExport[]
  /**
   * A connection is about to serve `entry`; the device stays open until `leave`.
   * @throws AtollError EXPORT_GONE if it went away since `get`; any other code if the connection is one too many
   */
  enter(entry: NbdExport, connection: ExportConnection): void
  /** Ends what `enter` began. */
  leave(entry: NbdExport, connection: ExportConnection): void
}
