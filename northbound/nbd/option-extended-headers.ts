import type { OptionChannel, ReceivedOption } from './option-channel.ts'
import { optionReply } from './protocol.ts'
import type { NegotiationSession } from './session.ts'

/**
 * EXTENDED_HEADERS: requests and replies get headers of 32 bytes, with lengths of 64 bits, and every reply is a chunk. It
 * takes the place of structured replies, whether they were asked for or not. Asking twice changes nothing.
 */
export async function answerExtendedHeaders(
  channel: OptionChannel,
  session: NegotiationSession,
  received: ReceivedOption,
): Promise<void> {
  if (received.data.length > 0) {
    await channel.refuse(received.number, optionReply.errorInvalid, 'EXTENDED_HEADERS takes no data')
    return
  }
  session.replies = 'extended'
  await channel.reply(received.number, { type: optionReply.ack })
}
