import type { OptionChannel, ReceivedOption } from './option-channel.ts'
import { optionReply } from './protocol.ts'
import type { NegotiationSession } from './session.ts'

/**
 * STRUCTURED_REPLY: from now on reads are answered in chunks. Asking twice changes nothing; who has extended headers has more
 * than that already, and is told so.
 */
export async function answerStructuredReply(
  channel: OptionChannel,
  session: NegotiationSession,
  received: ReceivedOption,
): Promise<void> {
  if (received.data.length > 0) {
    await channel.refuse(received.number, optionReply.errorInvalid, 'STRUCTURED_REPLY takes no data')
    return
  }
  if (session.replies === 'extended') {
    await channel.refuse(received.number, optionReply.errorExtendedHeadersRequired, 'extended headers were negotiated already')
    return
  }
  session.replies = 'structured'
  await channel.reply(received.number, { type: optionReply.ack })
}
