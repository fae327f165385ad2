import type { ByteStream } from './byte-stream.ts'
import { ExportInfoBuilder, exportInfoOf, readSizeAndFlags } from './export-info.ts'
import type { NbdExportInfo } from './export-info.ts'
import type { Greeting } from './greeting.ts'
import { NbdError, NbdOptionError } from './nbd-error.ts'
import { exportNamePaddingBytes, nameOf, option, optionReply, optionReplyErrorBit, stringBytesMax } from './protocol.ts'
import { encodeInfoRequest, encodeMetaContextRequest, encodeOption, readOptionReply } from './wire.ts'
import type { OptionReply } from './wire.ts'

/** Most answers to one option; a server that sends more is not listened to any longer. */
export const optionReplyCountMax = 100_000

/** An export as LIST shows it. */
export interface NbdListedExport {
  readonly name: string
  readonly description: string
}

/** A context that a server can report, with its id if it was selected. */
export interface NbdMetaContext {
  readonly name: string
  readonly id: number
}

/**
 * State 2 of a connection: options and their answers, one at a time.
 * Every method throws NbdOptionError when the server refuses (the next option may follow), NBD_PROTOCOL when it sends what
 * the protocol forbids, NBD_CONNECTION_LOST when it goes away.
 */
export class Haggling {
  readonly #stream: ByteStream
  readonly #greeting: Greeting

  constructor(stream: ByteStream, greeting: Greeting) {
    this.#stream = stream
    this.#greeting = greeting
  }

  get fixedNewstyle(): boolean {
    return this.#greeting.fixedNewstyle
  }

  /** Asks for structured replies: required for holes in reads and for block status. */
  async structuredReply(): Promise<void> {
    await this.#ask('STRUCTURED_REPLY', option.structuredReply, new Uint8Array(), refuseAll)
  }

  /** Asks for extended headers: requests and replies of 32 bytes with lengths of 64 bits; takes the place of structured replies. */
  async extendedHeaders(): Promise<void> {
    await this.#ask('EXTENDED_HEADERS', option.extendedHeaders, new Uint8Array(), refuseAll)
  }

  /** Selects metadata contexts for `exportName`. The ones that the server knows come back, each with the id it will use. */
  async setMetaContexts(exportName: string, queries: readonly string[]): Promise<NbdMetaContext[]> {
    const contexts = await this.#metaContexts('SET_META_CONTEXT', option.setMetaContext, exportName, queries)
    if (new Set(contexts.map((context) => context.id)).size !== contexts.length) {
      throw new NbdError(
        'NBD_PROTOCOL',
        `the server gave one id to several contexts: ${contexts.map((context) => `${context.name}=${context.id}`).join(', ')}`,
      )
    }
    return contexts
  }

  /** The contexts that match `queries` (`base:` for all of a namespace; none: everything the server has). */
  listMetaContexts(exportName: string, queries: readonly string[]): Promise<NbdMetaContext[]> {
    return this.#metaContexts('LIST_META_CONTEXT', option.listMetaContext, exportName, queries)
  }

  /** The exports that the server is willing to name. */
  async list(): Promise<NbdListedExport[]> {
    const exports: NbdListedExport[] = []
    await this.#ask('LIST', option.list, new Uint8Array(), (reply) => {
      if (reply.type !== optionReply.server) return false
      const nameBytes = reply.data.length < 4 ? -1 : reply.data.readUInt32BE(0)
      if (nameBytes < 0 || nameBytes > stringBytesMax || 4 + nameBytes > reply.data.length) {
        throw new NbdError('NBD_PROTOCOL', `an answer to LIST of ${reply.data.length} bytes with a name of ${nameBytes} bytes`)
      }
      exports.push({
        name: reply.data.toString('utf8', 4, 4 + nameBytes),
        description: reply.data.toString('utf8', 4 + nameBytes),
      })
      return true
    })
    return exports
  }

  /** What the server says of an export; the negotiation goes on. */
  info(exportName: string, items: readonly number[]): Promise<NbdExportInfo> {
    return this.#infoOrGo('INFO', option.info, exportName, items)
  }

  /** As `info`, and on success the transmission begins. */
  go(exportName: string, items: readonly number[]): Promise<NbdExportInfo> {
    return this.#infoOrGo('GO', option.go, exportName, items)
  }

  /** The way in for servers that do not know GO. A refusal is a closed connection, so no reason is known. */
  async exportName(exportName: string): Promise<NbdExportInfo> {
    this.#stream.write(encodeOption(option.exportName, Buffer.from(exportName)))
    let answer: Buffer
    try {
      answer = await this.#stream.read(10)
    } catch (cause) {
      throw new NbdError(
        'NBD_CONNECT_FAILED',
        `the server closed the connection when asked for the export ${JSON.stringify(exportName)}`,
        { cause, retryable: false },
      )
    }
    const { sizeBytes, transmissionFlags } = readSizeAndFlags(answer)
    if (!this.#greeting.noZeroes) await this.#stream.read(exportNamePaddingBytes)
    return exportInfoOf(sizeBytes, transmissionFlags)
  }

  /** Says goodbye and waits for the server's acknowledgement or its end. Never throws. */
  async abort(): Promise<void> {
    if (!this.#greeting.fixedNewstyle) return
    this.#stream.write(encodeOption(option.abort, new Uint8Array()))
    this.#stream.finishWriting()
    try {
      await readOptionReply(this.#stream)
    } catch (error) {
      if (!(error instanceof NbdError)) throw error
    }
  }

  async #infoOrGo(what: string, number: number, exportName: string, items: readonly number[]): Promise<NbdExportInfo> {
    const builder = new ExportInfoBuilder()
    await this.#ask(`${what} of export ${JSON.stringify(exportName)}`, number, encodeInfoRequest(exportName, items), (reply) => {
      if (reply.type !== optionReply.info) return false
      builder.add(reply.data)
      return true
    })
    return builder.finish()
  }

  async #metaContexts(what: string, number: number, exportName: string, queries: readonly string[]): Promise<NbdMetaContext[]> {
    const contexts: NbdMetaContext[] = []
    await this.#ask(what, number, encodeMetaContextRequest(exportName, queries), (reply) => {
      if (reply.type !== optionReply.metaContext) return false
      if (reply.data.length < 5 || reply.data.length > 4 + stringBytesMax) {
        throw new NbdError('NBD_PROTOCOL', `a context of ${reply.data.length} bytes in the answer to ${what}`)
      }
      contexts.push({ id: reply.data.readUInt32BE(0), name: reply.data.toString('utf8', 4) })
      return true
    })
    return contexts
  }

  /** Sends one option and reads its answers up to the acknowledgement. `accept` takes what comes before it. */
  async #ask(what: string, number: number, data: Uint8Array, accept: (reply: OptionReply) => boolean): Promise<void> {
    this.#stream.write(encodeOption(number, data))
    for (let count = 0; count <= optionReplyCountMax; count += 1) {
      const reply = await readOptionReply(this.#stream)
      if (reply.option !== number) {
        throw new NbdError('NBD_PROTOCOL', `the answer to ${what} is for option ${nameOf(option, reply.option)}`)
      }
      if ((reply.type & optionReplyErrorBit) !== 0) {
        throw new NbdOptionError(
          what,
          reply.type,
          reply.data.length === 0 ? null : reply.data.toString('utf8', 0, stringBytesMax),
        )
      }
      if (reply.type === optionReply.ack) {
        if (reply.data.length > 0)
          throw new NbdError('NBD_PROTOCOL', `the acknowledgement of ${what} carries ${reply.data.length} bytes`)
        return
      }
      if (!accept(reply))
        throw new NbdError('NBD_PROTOCOL', `the answer to ${what} is of type ${nameOf(optionReply, reply.type)}`)
    }
    throw new NbdError('NBD_PROTOCOL', `more than ${optionReplyCountMax} answers to ${what}`)
  }
}

function refuseAll(): boolean {
  return false
}
