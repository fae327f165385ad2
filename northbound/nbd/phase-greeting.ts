import { NegotiationEnded, type OptionChannel } from './option-channel.ts'
import { clientFlag, greetingBytes, greetingMagic, handshakeFlag, newstyleMagic } from './protocol.ts'
import type { NegotiationSession } from './session.ts'

const knownClientFlags = clientFlag.fixedNewstyle | clientFlag.noZeroes

/**
 * Phase 1: we greet, the client answers with its flags. An unknown flag is a client that wants what we do not have: the
 * protocol says to close. A client without C_FIXED_NEWSTYLE is served all the same.
 */
export async function greet(channel: OptionChannel, session: NegotiationSession): Promise<void> {
  const greeting = Buffer.alloc(greetingBytes)
  greeting.writeBigUInt64BE(greetingMagic, 0)
  greeting.writeBigUInt64BE(newstyleMagic, 8)
  greeting.writeUInt16BE(handshakeFlag.fixedNewstyle | handshakeFlag.noZeroes, 16)
  await channel.write(greeting)
  const flags = (await channel.read(4)).readUInt32BE(0)
  if ((flags & ~knownClientFlags) !== 0) throw new NegotiationEnded(`unknown client flags 0x${flags.toString(16)}`)
  session.noZeroes = (flags & clientFlag.noZeroes) !== 0
}
