import { toAtollError } from '@atoll/core'
import { transmissionFlagsOf } from './export-flags.ts'
import { NegotiationEnded, type OptionChannel, type ReceivedOption } from './option-channel.ts'
import { decodeText } from './option-text.ts'
import { exportNamePaddingBytes } from './protocol.ts'
import { absenceOf, transmissionOf } from './session.ts'
import type { NegotiationContext, NegotiationSession, Transmission } from './session.ts'

/** EXPORT_NAME: the way in of old clients. It has no error reply: whatever is wrong, the connection is closed. */
export async function answerExportName(
  channel: OptionChannel,
  context: NegotiationContext,
  session: NegotiationSession,
  received: ReceivedOption,
): Promise<Transmission> {
  if (context.isDraining()) throw new NegotiationEnded('the server is shutting down')
  if (session.replies === 'extended') throw new NegotiationEnded('EXPORT_NAME after extended headers were negotiated')
  const name = decodeText(received.data)
  if (name === null) throw new NegotiationEnded('EXPORT_NAME with a name that is not UTF-8 of at most 4096 bytes')
  const entry = context.exports.get(name)
  if (entry === null) throw new NegotiationEnded(absenceOf(context.exports, name).message)
  try {
    context.enter(entry)
  } catch (error) {
    throw new NegotiationEnded(toAtollError(error).message)
  }
  const transmission = transmissionOf(entry, session)
  const answer = Buffer.alloc(10 + (session.noZeroes ? 0 : exportNamePaddingBytes))
  answer.writeBigUInt64BE(BigInt(transmission.device.sizeBytes()), 0)
  answer.writeUInt16BE(transmissionFlagsOf(entry, session), 8)
  await channel.write(answer)
  return transmission
}
