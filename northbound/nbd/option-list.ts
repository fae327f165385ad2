import type { OptionChannel, ReceivedOption, Reply } from './option-channel.ts'
import { encodeText } from './option-text.ts'
import { optionReply } from './protocol.ts'
import type { NegotiationContext } from './session.ts'

/** LIST: one SERVER reply for each export, then the acknowledgement. Data with it is an error, and nothing is listed then. */
export async function answerList(channel: OptionChannel, context: NegotiationContext, received: ReceivedOption): Promise<void> {
  if (received.data.length > 0) {
    await channel.refuse(received.number, optionReply.errorInvalid, 'LIST takes no data')
    return
  }
  if (!context.listing) {
    await channel.refuse(received.number, optionReply.errorPolicy, 'exports are not listed here')
    return
  }
  const replies: Reply[] = context.exports.list().map(({ id, description }) => {
    const name = Buffer.from(id)
    const nameLength = Buffer.alloc(4)
    nameLength.writeUInt32BE(name.length, 0)
    return { type: optionReply.server, data: Buffer.concat([nameLength, name, encodeText(description)]) }
  })
  await channel.reply(received.number, ...replies, { type: optionReply.ack })
}
