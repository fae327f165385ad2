import { isAtollError, toAtollError } from '@atoll/core'
import { transmissionFlagsOf } from './export-flags.ts'
import type { NbdExport } from './export-table.ts'
import type { OptionChannel, ReceivedOption, Reply } from './option-channel.ts'
import { encodeText, OptionReader } from './option-text.ts'
import { blockBytesMax, blockBytesMin, blockBytesPreferred, infoItem, optionReply } from './protocol.ts'
import { absenceOf, transmissionOf } from './session.ts'
import type { NegotiationContext, NegotiationSession, Transmission } from './session.ts'

interface InfoRequest {
  readonly exportName: string
  readonly items: ReadonlySet<number>
}

/** INFO: what GO would say, and the negotiation goes on. */
export async function answerInfo(
  channel: OptionChannel,
  context: NegotiationContext,
  session: NegotiationSession,
  received: ReceivedOption,
): Promise<void> {
  const asked = await findExport(channel, context, received)
  if (asked === null) return
  await channel.reply(received.number, ...infoReplies(asked.entry, asked.items, session), { type: optionReply.ack })
}

/** GO: the same, and on success the transmission begins right behind the acknowledgement. Null: refused. */
export async function answerGo(
  channel: OptionChannel,
  context: NegotiationContext,
  session: NegotiationSession,
  received: ReceivedOption,
): Promise<Transmission | null> {
  const asked = await findExport(channel, context, received)
  if (asked === null) return null
  const { entry } = asked
  try {
    context.enter(entry)
  } catch (error) {
    // The export may have gone since it was found, or have clients enough: the client hears which.
    const type = isAtollError(error, 'EXPORT_GONE') ? optionReply.errorShutdown : optionReply.errorPolicy
    await channel.refuse(received.number, type, toAtollError(error).message)
    return null
  }
  // Nothing is awaited between entering and this: the device is the one that `enter` keeps open.
  const transmission = transmissionOf(entry, session)
  await channel.reply(received.number, ...infoReplies(entry, asked.items, session), { type: optionReply.ack })
  return transmission
}

async function findExport(
  channel: OptionChannel,
  context: NegotiationContext,
  received: ReceivedOption,
): Promise<{ entry: NbdExport; items: ReadonlySet<number> } | null> {
  const request = parseInfoRequest(received.data)
  if (request === null) {
    await channel.refuse(
      received.number,
      optionReply.errorInvalid,
      'the name or the number of info requests does not fit the data',
    )
    return null
  }
  const entry = context.exports.get(request.exportName)
  if (entry === null) {
    const absence = absenceOf(context.exports, request.exportName)
    await channel.refuse(received.number, absence.type, absence.message)
    return null
  }
  return { entry, items: request.items }
}

/** Name length, name, count, that many 16-bit numbers, and nothing else. */
function parseInfoRequest(data: Buffer): InfoRequest | null {
  const reader = new OptionReader(data)
  const exportName = reader.countedText()
  const count = reader.uint16()
  if (exportName === null || count === null || reader.leftBytes !== 2 * count) return null
  const items = new Set<number>()
  for (let item = reader.uint16(); item !== null; item = reader.uint16()) items.add(item)
  return { exportName, items }
}

/** Size and flags always, the rest if it was asked for; unknown items are passed over. */
function infoReplies(entry: NbdExport, items: ReadonlySet<number>, session: NegotiationSession): Reply[] {
  const exportItem = Buffer.alloc(12)
  exportItem.writeUInt16BE(infoItem.export, 0)
  exportItem.writeBigUInt64BE(BigInt(entry.device.sizeBytes()), 2)
  exportItem.writeUInt16BE(transmissionFlagsOf(entry, session), 10)
  const replies: Reply[] = [{ type: optionReply.info, data: exportItem }]
  if (items.has(infoItem.name)) replies.push({ type: optionReply.info, data: textItem(infoItem.name, entry.id) })
  if (items.has(infoItem.description))
    replies.push({ type: optionReply.info, data: textItem(infoItem.description, entry.description) })
  if (items.has(infoItem.blockSize)) {
    const blockSize = Buffer.alloc(14)
    blockSize.writeUInt16BE(infoItem.blockSize, 0)
    blockSize.writeUInt32BE(blockBytesMin, 2)
    blockSize.writeUInt32BE(blockBytesPreferred, 6)
    blockSize.writeUInt32BE(blockBytesMax, 10)
    replies.push({ type: optionReply.info, data: blockSize })
  }
  return replies
}

function textItem(item: number, text: string): Buffer {
  const head = Buffer.alloc(2)
  head.writeUInt16BE(item, 0)
  return Buffer.concat([head, encodeText(text)])
}
