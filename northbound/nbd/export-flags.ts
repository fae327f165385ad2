import type { NbdExport } from './export-table.ts'
import { contextsFor, type NegotiationSession } from './session.ts'
import { transmissionFlag } from './protocol.ts'

/**
 * What we say of an export, in INFO, GO and EXPORT_NAME alike. DF only where replies have chunks, since it means nothing
 * without; a filter of statuses only where requests may have a payload and there is a choice; several connections may be mixed
 * because a flush covers them all. Never ROTATIONAL: clients would put requests in an order that gains nothing here.
 */
export function transmissionFlagsOf(entry: NbdExport, session: NegotiationSession): number {
  const readOnly = entry.readOnly || entry.device.readOnly()
  return (
    transmissionFlag.hasFlags |
    transmissionFlag.flush |
    transmissionFlag.fua |
    transmissionFlag.canMultiConn |
    transmissionFlag.cache |
    (readOnly ? transmissionFlag.readOnly : transmissionFlag.trim | transmissionFlag.writeZeroes | transmissionFlag.fastZero) |
    (session.replies === 'simple' ? 0 : transmissionFlag.df) |
    (session.replies === 'extended' && contextsFor(entry, session).length > 0 ? transmissionFlag.blockStatusPayload : 0)
  )
}
