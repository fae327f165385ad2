import type { OptionChannel, ReceivedOption, Reply } from './option-channel.ts'
import { OptionReader } from './option-text.ts'
import { allocationContextId, allocationContextName, optionReply } from './protocol.ts'
import { absenceOf } from './session.ts'
import type { NegotiationContext, NegotiationSession } from './session.ts'

interface MetaContextRequest {
  readonly exportName: string
  readonly queries: readonly string[]
}

/** LIST_META_CONTEXT: what there is. No query, the namespace alone, or the name itself show the one context. */
export async function answerListMetaContext(
  channel: OptionChannel,
  context: NegotiationContext,
  session: NegotiationSession,
  received: ReceivedOption,
): Promise<void> {
  const request = await findRequest(channel, context, session, received)
  if (request === null) return
  const { queries } = request
  const isShown = queries.length === 0 || queries.some((query) => query === 'base:' || query === allocationContextName)
  // Ids mean nothing in a listing; the protocol wants zero.
  await acknowledge(channel, received.number, isShown, 0)
}

/** SET_META_CONTEXT: selects by full name only; what we do not know is left out. A failure drops what was selected before. */
export async function answerSetMetaContext(
  channel: OptionChannel,
  context: NegotiationContext,
  session: NegotiationSession,
  received: ReceivedOption,
): Promise<void> {
  session.allocationContextFor = null
  const request = await findRequest(channel, context, session, received)
  if (request === null) return
  // Once, however often it was asked for.
  const isSelected = request.queries.includes(allocationContextName)
  session.allocationContextFor = isSelected ? request.exportName : null
  await acknowledge(channel, received.number, isSelected, allocationContextId)
}

function acknowledge(channel: OptionChannel, number: number, withContext: boolean, id: number): Promise<void> {
  const replies: Reply[] = []
  if (withContext) {
    const idBytes = Buffer.alloc(4)
    idBytes.writeUInt32BE(id, 0)
    replies.push({ type: optionReply.metaContext, data: Buffer.concat([idBytes, Buffer.from(allocationContextName)]) })
  }
  return channel.reply(number, ...replies, { type: optionReply.ack })
}

async function findRequest(
  channel: OptionChannel,
  context: NegotiationContext,
  session: NegotiationSession,
  received: ReceivedOption,
): Promise<MetaContextRequest | null> {
  if (!session.structuredReplies) {
    await channel.refuse(received.number, optionReply.errorInvalid, 'metadata contexts need structured replies')
    return null
  }
  const request = parseMetaContextRequest(received.data)
  if (request === null) {
    await channel.refuse(received.number, optionReply.errorInvalid, 'the name or a query does not fit the data')
    return null
  }
  if (context.exports.get(request.exportName) === null) {
    const absence = absenceOf(context.exports, request.exportName)
    await channel.refuse(received.number, absence.type, absence.message)
    return null
  }
  return request
}

/** Name length, name, count, that many strings with their lengths, and nothing else. */
function parseMetaContextRequest(data: Buffer): MetaContextRequest | null {
  const reader = new OptionReader(data)
  const exportName = reader.countedText()
  const count = reader.uint32()
  // Every query takes at least its length, which bounds the loop by the data that is there.
  if (exportName === null || count === null || count > reader.leftBytes / 4) return null
  const queries: string[] = []
  for (let index = 0; index < count; index += 1) {
    const query = reader.countedText()
    if (query === null) return null
    queries.push(query)
  }
  return reader.leftBytes === 0 ? { exportName, queries } : null
}
