import { toAtollError } from '@atoll/core'
import type { NbdExport } from './export-table.ts'
import { listContexts, selectContexts, selectedContextsMax } from './meta-contexts.ts'
import type { OptionChannel, ReceivedOption, Reply } from './option-channel.ts'
import { OptionReader } from './option-text.ts'
import { optionReply } from './protocol.ts'
import { absenceOf } from './session.ts'
import type { NegotiationContext, NegotiationSession } from './session.ts'

interface MetaContextRequest {
  readonly exportName: string
  readonly queries: readonly string[]
}

/** LIST_META_CONTEXT: what there is, or what the queries ask for. */
export async function answerListMetaContext(
  channel: OptionChannel,
  context: NegotiationContext,
  session: NegotiationSession,
  received: ReceivedOption,
): Promise<void> {
  const found = await findRequest(channel, context, session, received)
  if (found === null) return
  const names = await orRefuse(channel, received, () => listContexts(found.entry, found.request.queries))
  // Ids mean nothing in a listing; the protocol wants zero.
  if (names !== null)
    await acknowledge(
      channel,
      received.number,
      names.map((name) => ({ id: 0, name })),
    )
}

/** SET_META_CONTEXT: selects by full name only; what we do not know is left out. A failure drops what was selected before. */
export async function answerSetMetaContext(
  channel: OptionChannel,
  context: NegotiationContext,
  session: NegotiationSession,
  received: ReceivedOption,
): Promise<void> {
  session.selection = null
  const found = await findRequest(channel, context, session, received)
  if (found === null) return
  const { request, entry } = found
  const selected = await orRefuse(channel, received, async () => ({ contexts: await selectContexts(entry, request.queries) }))
  if (selected === null) return
  const { contexts } = selected
  if (contexts === null) {
    await channel.refuse(received.number, optionReply.errorTooBig, `at most ${selectedContextsMax} contexts can be selected`)
    return
  }
  session.selection = { exportName: request.exportName, contexts }
  await acknowledge(
    channel,
    received.number,
    contexts.map(({ name, context: { id } }) => ({ id, name })),
  )
}

/** What `ask` gives; null if that fails, which the client is told. The export may have gone, or a map be unreadable. */
async function orRefuse<T>(channel: OptionChannel, received: ReceivedOption, ask: () => Promise<T>): Promise<T | null> {
  try {
    return await ask()
  } catch (error) {
    await channel.refuse(received.number, optionReply.errorPlatform, toAtollError(error).message)
    return null
  }
}

function acknowledge(channel: OptionChannel, number: number, contexts: readonly { id: number; name: string }[]): Promise<void> {
  const replies: Reply[] = contexts.map(({ id, name }) => {
    const idBytes = Buffer.alloc(4)
    idBytes.writeUInt32BE(id, 0)
    return { type: optionReply.metaContext, data: Buffer.concat([idBytes, Buffer.from(name)]) }
  })
  return channel.reply(number, ...replies, { type: optionReply.ack })
}

async function findRequest(
  channel: OptionChannel,
  context: NegotiationContext,
  session: NegotiationSession,
  received: ReceivedOption,
): Promise<{ request: MetaContextRequest; entry: NbdExport } | null> {
  if (session.replies === 'simple') {
    await channel.refuse(
      received.number,
      optionReply.errorInvalid,
      'metadata contexts need structured replies or extended headers',
    )
    return null
  }
  const request = parseMetaContextRequest(received.data)
  if (request === null) {
    await channel.refuse(received.number, optionReply.errorInvalid, 'the name or a query does not fit the data')
    return null
  }
  const entry = context.exports.get(request.exportName)
  if (entry === null) {
    const absence = absenceOf(context.exports, request.exportName)
    await channel.refuse(received.number, absence.type, absence.message)
    return null
  }
  return { request, entry }
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
