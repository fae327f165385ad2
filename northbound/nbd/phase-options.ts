import { answerExportName } from './option-export-name.ts'
import { answerExtendedHeaders } from './option-extended-headers.ts'
import { answerGo, answerInfo } from './option-info.ts'
import { answerList } from './option-list.ts'
import { answerListMetaContext, answerSetMetaContext } from './option-meta-context.ts'
import { answerStartTls, isTlsMissing, refuseWithoutTls } from './option-starttls.ts'
import { answerStructuredReply } from './option-structured-reply.ts'
import { NegotiationEnded, type OptionChannel } from './option-channel.ts'
import { option, optionReply } from './protocol.ts'
import type { NegotiationContext, NegotiationSession, Transmission } from './session.ts'

/**
 * Phase 2: options, one after the other, until one of them starts the transmission. An option that we do not know, or not
 * yet, is refused and the next one follows.
 * @throws NegotiationEnded when it ends without transmission.
 */
export async function haggle(
  channel: OptionChannel,
  context: NegotiationContext,
  session: NegotiationSession,
): Promise<Transmission> {
  for (;;) {
    const received = await channel.nextOption(isTlsMissing(context) ? optionReply.errorTlsRequired : optionReply.errorTooBig)
    const { number } = received
    if (number === option.abort) {
      // Data with it is ignored: the client is leaving.
      await channel.reply(number, { type: optionReply.ack })
      throw new NegotiationEnded('the client aborted')
    }
    if (number === option.startTls) {
      await answerStartTls(channel, context, session, received)
      continue
    }
    if (isTlsMissing(context)) {
      await refuseWithoutTls(channel, received)
      continue
    }
    if (number === option.exportName) return answerExportName(channel, context, session, received)
    if (context.isDraining()) {
      await channel.refuse(number, optionReply.errorShutdown, 'the server is shutting down')
      continue
    }
    switch (number) {
      case option.list:
        await answerList(channel, context, received)
        break
      case option.info:
        await answerInfo(channel, context, session, received)
        break
      case option.go: {
        const transmission = await answerGo(channel, context, session, received)
        if (transmission !== null) return transmission
        break
      }
      case option.structuredReply:
        await answerStructuredReply(channel, session, received)
        break
      case option.extendedHeaders:
        await answerExtendedHeaders(channel, session, received)
        break
      case option.listMetaContext:
        await answerListMetaContext(channel, context, session, received)
        break
      case option.setMetaContext:
        await answerSetMetaContext(channel, context, session, received)
        break
      default:
        await channel.refuse(number, optionReply.errorUnsupported, `option ${number} is not supported`)
    }
  }
}
