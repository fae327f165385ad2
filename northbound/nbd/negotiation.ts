/**
 * The negotiation of one connection. Its states, each in a file of its own:
 *
 * 1. greeting (phase-greeting.ts): our flags, the client's flags.
 * 2. options (phase-options.ts, option-*.ts): questions and answers, any number, until GO or EXPORT_NAME succeeds.
 * 3. transmission (phase-transmission.ts): native; no request enters JavaScript (I10).
 *
 * Everything that comes from the client is hostile (I7): lengths are compared with bounds before anything is allocated or
 * read, and an option's data is consumed whatever becomes of it, so that the two sides stay in step.
 */
import type { NegotiationLimits } from './negotiation-limits.ts'
import { OptionChannel, type NegotiationSocket } from './option-channel.ts'
import { greet } from './phase-greeting.ts'
import { haggle } from './phase-options.ts'
import { newSession, type NegotiationContext, type Transmission } from './session.ts'

/**
 * Negotiates up to the transmission; the export is entered then.
 * @throws NegotiationEnded when the client leaves or breaks a rule that has no error reply; what the socket throws.
 */
export async function negotiate(
  socket: NegotiationSocket,
  context: NegotiationContext,
  limits: NegotiationLimits,
): Promise<Transmission> {
  const channel = new OptionChannel(socket, limits)
  const session = newSession()
  await greet(channel, session)
  return haggle(channel, context, session)
}
