import { openByteStream } from './byte-stream.ts'
import type { ByteStream } from './byte-stream.ts'
import { exchangeGreeting } from './greeting.ts'
import { Haggling } from './haggling.ts'
import type { NbdListedExport, NbdMetaContext } from './haggling.ts'
import type { NbdExportInfo } from './export-info.ts'
import { defaultConnectionLimits, NbdConnection } from './nbd-connection.ts'
import type { NbdConnectionLimits } from './nbd-connection.ts'
import { NbdError, NbdOptionError } from './nbd-error.ts'
import { resolveTarget } from './nbd-target.ts'
import type { NbdTarget } from './nbd-target.ts'
import { infoItem, optionReply, stringBytesMax } from './protocol.ts'

/** How to reach a server. */
export interface NbdReachOptions {
  /** Bound of connecting and negotiating together. Default 10,000. */
  readonly connectTimeoutMs?: number
  /** Ends connecting and negotiating; no effect on the connection that comes out. */
  readonly signal?: AbortSignal
}

/** How to connect. */
export interface NbdConnectOptions extends NbdReachOptions, Partial<NbdConnectionLimits> {
  /** Default: the one in the URI, else `''`. */
  readonly exportName?: string
  /** Ask for structured replies. Default true; a server without them is taken as it is. */
  readonly structuredReplies?: boolean
  /** Ask for extended headers (an experimental part of the protocol). Default false; a server without them is taken as it is. */
  readonly extendedHeaders?: boolean
  /** Metadata contexts to ask for, such as `base:allocation`. Default none. What the server agreed to is in `connection.metaContexts`. */
  readonly metaContexts?: readonly string[]
}

/** What INFO and LIST_META_CONTEXT say of an export. */
export interface NbdInfo extends NbdExportInfo {
  readonly exportName: string
  readonly structuredReplies: boolean
  /** Contexts that the server could report. */
  readonly metaContexts: readonly string[]
}

const defaultConnectTimeoutMs = 10_000
const infoItems: readonly number[] = [infoItem.name, infoItem.description, infoItem.blockSize]

/**
 * Connects to an export: GO, or EXPORT_NAME with servers that do not know GO.
 * @throws NbdError NBD_URI_INVALID, NBD_TLS_UNSUPPORTED, NBD_CONNECT_FAILED, NBD_CONNECT_TIMEOUT, NBD_ABORTED, NBD_PROTOCOL,
 * NBD_UNSUPPORTED, NBD_CONNECTION_LOST; NbdOptionError when the server refuses the export.
 */
export async function connect(target: NbdTarget, options: NbdConnectOptions = {}): Promise<NbdConnection> {
  const { address, exportName: exportNameInUri } = resolveTarget(target)
  const exportName = checkExportName(options.exportName ?? exportNameInUri)
  const limits: NbdConnectionLimits = {
    inFlightMax: options.inFlightMax ?? defaultConnectionLimits.inFlightMax,
    inFlightBytesMax: options.inFlightBytesMax ?? defaultConnectionLimits.inFlightBytesMax,
    waitingMax: options.waitingMax ?? defaultConnectionLimits.waitingMax,
    disconnectTimeoutMs: options.disconnectTimeoutMs ?? defaultConnectionLimits.disconnectTimeoutMs,
  }
  return withStream(address, options, async (stream) => {
    const haggling = new Haggling(stream, await exchangeGreeting(stream))
    const extendedHeaders = (options.extendedHeaders ?? false) && (await askForExtendedHeaders(haggling))
    const structuredReplies =
      extendedHeaders || ((options.structuredReplies ?? true) && (await askForStructuredReplies(haggling)))
    const metaContexts = structuredReplies ? await selectMetaContexts(haggling, exportName, options.metaContexts ?? []) : []
    const info = await goOrExportName(haggling, exportName, !extendedHeaders)
    const session = {
      exportName,
      info,
      structuredReplies,
      extendedHeaders,
      metaContexts: new Map(metaContexts.map((context) => [context.name, context.id])),
    }
    return new NbdConnection(stream, session, limits)
  })
}

/**
 * The exports that the server is willing to name.
 * @throws as `connect`; NbdOptionError when the server does not list (errorPolicy, errorUnsupported).
 */
export async function list(target: NbdTarget, options: NbdReachOptions = {}): Promise<NbdListedExport[]> {
  return withStream(resolveTarget(target).address, options, async (stream) => {
    const haggling = new Haggling(stream, await exchangeGreeting(stream))
    if (!haggling.fixedNewstyle) throw new NbdError('NBD_UNSUPPORTED', 'the server knows no option but EXPORT_NAME')
    const exports = await haggling.list()
    await sayGoodbye(stream, haggling)
    return exports
  })
}

/** What the server says of an export, without entering it where the server knows INFO. @throws as `connect`. */
export async function info(
  target: NbdTarget,
  options: NbdReachOptions & { readonly exportName?: string } = {},
): Promise<NbdInfo> {
  const { address, exportName: exportNameInUri } = resolveTarget(target)
  const exportName = checkExportName(options.exportName ?? exportNameInUri)
  const known = await withStream(address, options, async (stream): Promise<NbdInfo | null> => {
    const haggling = new Haggling(stream, await exchangeGreeting(stream))
    const structuredReplies = await askForStructuredReplies(haggling)
    const exportInfo = haggling.fixedNewstyle ? await unlessUnsupported(haggling.info(exportName, infoItems)) : null
    if (exportInfo === null) {
      await sayGoodbye(stream, haggling)
      return null
    }
    const metaContexts = structuredReplies ? await unlessUnsupported(haggling.listMetaContexts(exportName, [])) : null
    await sayGoodbye(stream, haggling)
    return { ...exportInfo, exportName, structuredReplies, metaContexts: (metaContexts ?? []).map((context) => context.name) }
  })
  if (known !== null) return known
  const connection = await connect(target, { ...options, exportName })
  await connection.disconnect()
  return { ...connection.info, exportName, structuredReplies: connection.structuredReplies, metaContexts: [] }
}

/** Runs `use` over a fresh stream within the time limit; the stream is closed if it fails. */
export async function withStream<T>(
  address: Parameters<typeof openByteStream>[0],
  options: NbdReachOptions,
  use: (stream: ByteStream) => Promise<T>,
): Promise<T> {
  const limit = new AbortController()
  const timeoutMs = options.connectTimeoutMs ?? defaultConnectTimeoutMs
  const timer = setTimeout(() => {
    limit.abort(new NbdError('NBD_CONNECT_TIMEOUT', `no connection within ${timeoutMs} ms`))
  }, timeoutMs)
  const signal = options.signal === undefined ? limit.signal : AbortSignal.any([limit.signal, options.signal])
  let stream: ByteStream | null = null
  const closeStream = (): void => stream?.destroy()
  try {
    stream = await openByteStream(address, signal)
    signal.addEventListener('abort', closeStream, { once: true })
    return await use(stream)
  } catch (error) {
    stream?.destroy()
    if (signal.aborted)
      throw signal.reason instanceof NbdError
        ? signal.reason
        : new NbdError('NBD_ABORTED', 'the caller gave up', { cause: signal.reason })
    throw error
  } finally {
    clearTimeout(timer)
    signal.removeEventListener('abort', closeStream)
  }
}

async function askForStructuredReplies(haggling: Haggling): Promise<boolean> {
  if (!haggling.fixedNewstyle) return false
  return (await unlessRefused(haggling.structuredReply().then(() => true))) ?? false
}

async function askForExtendedHeaders(haggling: Haggling): Promise<boolean> {
  if (!haggling.fixedNewstyle) return false
  return (await unlessRefused(haggling.extendedHeaders().then(() => true))) ?? false
}

async function selectMetaContexts(haggling: Haggling, exportName: string, queries: readonly string[]): Promise<NbdMetaContext[]> {
  if (queries.length === 0) return []
  // A server that does not know the export says so again, and more clearly, in the answer to GO.
  return (await unlessRefused(haggling.setMetaContexts(exportName, queries))) ?? []
}

async function goOrExportName(haggling: Haggling, exportName: string, mayFallBack: boolean): Promise<NbdExportInfo> {
  if (haggling.fixedNewstyle) {
    let known: NbdExportInfo | null
    try {
      known = await unlessUnsupported(haggling.go(exportName, infoItems))
    } catch (error) {
      if (error instanceof NbdOptionError) await haggling.abort()
      throw error
    }
    if (known !== null) return known
    if (!mayFallBack) throw new NbdError('NBD_PROTOCOL', 'the server has extended headers and does not know GO')
  }
  return haggling.exportName(exportName)
}

async function sayGoodbye(stream: ByteStream, haggling: Haggling): Promise<void> {
  // The answers are in hand: whether the server acknowledges is all the same now, but it should not write into a closed socket.
  await haggling.abort()
  stream.destroy()
  await stream.closed
}

async function unlessUnsupported<T>(asked: Promise<T>): Promise<T | null> {
  try {
    return await asked
  } catch (error) {
    if (error instanceof NbdOptionError && error.replyType === optionReply.errorUnsupported) return null
    throw error
  }
}

async function unlessRefused<T>(asked: Promise<T>): Promise<T | null> {
  try {
    return await asked
  } catch (error) {
    if (error instanceof NbdOptionError && error.replyType !== optionReply.errorShutdown) return null
    throw error
  }
}

function checkExportName(name: string): string {
  if (Buffer.byteLength(name) > stringBytesMax || name.includes('\0')) {
    throw new NbdError(
      'NBD_URI_INVALID',
      `the export name has ${Buffer.byteLength(name)} bytes (limit ${stringBytesMax}) or a NUL in it`,
    )
  }
  return name
}
