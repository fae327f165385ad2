/**
 * STARTTLS, and what is answered before it where it is required.
 *
 * Nothing that came in the clear counts afterwards: what was negotiated is forgotten, and bytes that came behind the option are
 * taken as the first record of the handshake, which fails on them (CVE-2021-3716 was the other way round).
 */
import { NegotiationEnded, type OptionChannel, type ReceivedOption } from './option-channel.ts'
import { option, optionReply } from './protocol.ts'
import { newSession, type NegotiationContext, type NegotiationSession } from './session.ts'

/** How a server offers TLS: clients may start it, or have to before anything else. A server without any has neither. */
export type TlsMode = 'optional' | 'required'

/** TLS of one connection that is being negotiated. */
export interface NegotiationTls {
  readonly mode: TlsMode
  /** Whether the connection goes through TLS now. */
  isActive(): boolean
  /** Shakes hands; what is read and written afterwards goes through TLS. Throws as `Connection.startTls` does. */
  start(): Promise<void>
}

/** STARTTLS: an acknowledgement in the clear, then the handshake, then the negotiation begins anew. */
export async function answerStartTls(
  channel: OptionChannel,
  context: NegotiationContext,
  session: NegotiationSession,
  received: ReceivedOption,
): Promise<void> {
  const { tls } = context
  const { number } = received
  if (tls === undefined) return channel.refuse(number, optionReply.errorUnsupported, 'TLS is not offered here')
  if (tls.isActive()) return channel.refuse(number, optionReply.errorInvalid, 'the connection goes through TLS already')
  if (received.data.length > 0) return channel.refuse(number, optionReply.errorInvalid, 'STARTTLS takes no data')
  if (context.isDraining()) return channel.refuse(number, optionReply.errorShutdown, 'the server is shutting down')
  await channel.reply(number, { type: optionReply.ack })
  await tls.start()
  // The flags of the greeting are no option: they stay.
  Object.assign(session, newSession(), { noZeroes: session.noZeroes })
}

/** Whether nothing but STARTTLS and ABORT is answered yet. */
export function isTlsMissing({ tls }: NegotiationContext): boolean {
  return tls?.mode === 'required' && !tls.isActive()
}

/** Any other option where TLS is required. EXPORT_NAME has no error reply, so it ends the connection. */
export async function refuseWithoutTls(channel: OptionChannel, { number }: ReceivedOption): Promise<void> {
  if (number === option.exportName) throw new NegotiationEnded('EXPORT_NAME before TLS was started')
  await channel.refuse(number, optionReply.errorTlsRequired, 'this server wants TLS: start it first')
}
