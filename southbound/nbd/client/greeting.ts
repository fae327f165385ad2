import type { ByteStream } from './byte-stream.ts'
import { NbdError } from './nbd-error.ts'
import { clientFlag, greetingMagic, handshakeFlag, newstyleMagic, oldstyleMagic } from './protocol.ts'

/** What both sides agreed on before the first option. */
export interface Greeting {
  /** The server answers options other than EXPORT_NAME. */
  readonly fixedNewstyle: boolean
  /** No padding after the answer to EXPORT_NAME. */
  readonly noZeroes: boolean
}

/**
 * State 1 of a connection: reads the server's greeting and answers with the flags that both sides know.
 * @throws NbdError NBD_PROTOCOL, NBD_UNSUPPORTED (an oldstyle server), NBD_CONNECTION_LOST.
 */
export async function exchangeGreeting(stream: ByteStream): Promise<Greeting> {
  const greeting = await stream.read(18)
  const magic = greeting.readBigUInt64BE(0)
  if (magic !== greetingMagic)
    throw new NbdError('NBD_PROTOCOL', `the server's greeting starts with 0x${magic.toString(16)}: not an NBD server`)
  const style = greeting.readBigUInt64BE(8)
  if (style === oldstyleMagic) throw new NbdError('NBD_UNSUPPORTED', 'the server speaks the oldstyle negotiation only')
  if (style !== newstyleMagic)
    throw new NbdError('NBD_PROTOCOL', `the server's greeting has 0x${style.toString(16)} where IHAVEOPT should be`)
  const offered = greeting.readUInt16BE(16)
  const fixedNewstyle = (offered & handshakeFlag.fixedNewstyle) !== 0
  const noZeroes = (offered & handshakeFlag.noZeroes) !== 0
  const answer = Buffer.alloc(4)
  answer.writeUInt32BE((fixedNewstyle ? clientFlag.fixedNewstyle : 0) | (noZeroes ? clientFlag.noZeroes : 0), 0)
  stream.write(answer)
  return { fixedNewstyle, noZeroes }
}
