import type { NbdExport } from './export-table.ts'
import type { NegotiationSession } from './session.ts'
import { transmissionFlag } from './protocol.ts'

/**
 * What we say of an export, in INFO, GO and EXPORT_NAME alike. DF only with structured replies, since it means nothing
 * without; several connections may be mixed because a flush covers them all.
 */
export function transmissionFlagsOf(entry: NbdExport, session: NegotiationSession): number {
  const readOnly = entry.readOnly || entry.device.readOnly()
  return (
    transmissionFlag.hasFlags |
    transmissionFlag.flush |
    transmissionFlag.fua |
    transmissionFlag.canMultiConn |
    (readOnly ? transmissionFlag.readOnly : transmissionFlag.trim | transmissionFlag.writeZeroes) |
    (session.structuredReplies ? transmissionFlag.df : 0)
  )
}
