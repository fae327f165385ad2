import type { Device } from '@atoll/native'
import type { ExportTable, NbdExport } from './export-table.ts'
import type { NegotiationTls } from './option-starttls.ts'
import { allocationContextId, optionReply } from './protocol.ts'

/** What a negotiation may know of the server around it. */
export interface NegotiationContext {
  readonly exports: ExportTable
  /** Whether LIST names the exports; else it is refused by policy. */
  readonly listing: boolean
  /** Absent: there is no TLS here. */
  readonly tls?: NegotiationTls
  /** The server is stopping: every option is answered ERR_SHUTDOWN. */
  isDraining(): boolean
  /** Counts the connection as a client of the export. Throws as `ExportTable.enter` does. */
  enter(entry: NbdExport): void
}

/** What one client has negotiated so far. */
export interface NegotiationSession {
  /** Asked for by the client: no padding after the answer to EXPORT_NAME. */
  noZeroes: boolean
  structuredReplies: boolean
  /** The last successful SET_META_CONTEXT: the export it was for, if `base:allocation` was selected. */
  allocationContextFor: string | null
}

/** Where a successful negotiation ends. The export is entered. */
export interface Transmission {
  readonly entry: NbdExport
  readonly device: Device
  readonly readOnly: boolean
  readonly structuredReplies: boolean
  /** Null: BLOCK_STATUS was not negotiated. */
  readonly allocationContextId: number | null
}

export function newSession(): NegotiationSession {
  return { noZeroes: false, structuredReplies: false, allocationContextFor: null }
}

/** What was negotiated, for the export that the client entered: contexts selected for another one do not count. */
export function transmissionOf(entry: NbdExport, session: NegotiationSession): Transmission {
  const { device } = entry
  return {
    entry,
    device,
    readOnly: entry.readOnly || device.readOnly(),
    structuredReplies: session.structuredReplies,
    allocationContextId: session.allocationContextFor === entry.id ? allocationContextId : null,
  }
}

/** Why there is no such export: the error to answer with and a sentence. */
export function absenceOf(exports: ExportTable, name: string): { type: number; message: string } {
  return exports.isSuspended?.(name)
    ? {
        type: optionReply.errorShutdown,
        message: `export ${JSON.stringify(name)} is being opened again; connect again in a moment`,
      }
    : { type: optionReply.errorUnknown, message: `there is no export ${JSON.stringify(name)}` }
}
