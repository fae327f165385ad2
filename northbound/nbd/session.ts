import type { Device, NbdMetaContext, NbdReplyForm } from '@atoll/native'
import type { ExportTable, NbdExport } from './export-table.ts'
import type { SelectedContext } from './meta-contexts.ts'
import type { NegotiationTls } from './option-starttls.ts'
import { optionReply } from './protocol.ts'

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
  replies: NbdReplyForm
  /** The last successful SET_META_CONTEXT: the export it was for, and what it selected. */
  selection: { readonly exportName: string; readonly contexts: readonly SelectedContext[] } | null
}

/** Where a successful negotiation ends. The export is entered. */
export interface Transmission {
  readonly entry: NbdExport
  readonly device: Device
  readonly readOnly: boolean
  readonly replies: NbdReplyForm
  /** Empty: BLOCK_STATUS was not negotiated. */
  readonly contexts: readonly NbdMetaContext[]
}

export function newSession(): NegotiationSession {
  return { noZeroes: false, replies: 'simple', selection: null }
}

/** What was negotiated, for the export that the client entered: contexts selected for another one do not count. */
export function transmissionOf(entry: NbdExport, session: NegotiationSession): Transmission {
  const { device } = entry
  return {
    entry,
    device,
    readOnly: entry.readOnly || device.readOnly(),
    replies: session.replies,
    contexts: contextsFor(entry, session).map(({ context }) => context),
  }
}

/** What the client has selected for this export. */
export function contextsFor(entry: NbdExport, { selection }: NegotiationSession): readonly SelectedContext[] {
  return selection?.exportName === entry.id ? selection.contexts : []
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
