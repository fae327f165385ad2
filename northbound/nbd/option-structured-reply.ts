import type { OptionChannel, ReceivedOption } from './option-channel.ts'
import { optionReply } from './protocol.ts'
import type { NegotiationSession } from './session.ts'

/** STRUCTURED_REPLY: from now on reads are answered in chunks. Asking twice changes nothing. */
export async function answerStructuredReply(
  channel: OptionChannel,
  session: NegotiationSession,
  received: ReceivedOption,
): Promise<void> {
  if (received.data.length > 0) {
    await channel.refuse(received.number, optionReply.errorInvalid, 'STRUCTURED_REPLY takes no data')
    return
  }
  session.structuredReplies = true
  await channel.reply(received.number, { type: optionReply.ack })
}
