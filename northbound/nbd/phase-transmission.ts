import type { Connection } from '@atoll/native'
import { blockBytesMax } from './protocol.ts'
import type { Transmission } from './session.ts'

/** How a transmission ended. */
export type TransmissionEnd = Awaited<ReturnType<Connection['serveNbd']>>

/** Phase 3: hands the socket to native code and hears of it again when it has ended. */
export function transmit(connection: Connection, transmission: Transmission): Promise<TransmissionEnd> {
  return connection.serveNbd(transmission.device, {
    replies: transmission.replies,
    contexts: transmission.contexts,
    readOnly: transmission.readOnly,
    requestBytesMax: blockBytesMax,
  })
}
