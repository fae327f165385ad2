/**
 * Fetches one resource over HTTP for an import.
 *
 * Rules:
 * - Only addresses that the policy allows are connected to (import-address.ts), and the connection is pinned to the checked
 *   one. Redirects are followed within one origin only, and not many.
 * - Every wait has a bound: for a connection and the answer's header, and for bytes (a server that trickles is as good as dead).
 * - The body is taken as it is: no content coding. Its end must be marked, or a cut connection would look like a whole image.
 * - Credentials and the query of the URL appear in no message.
 */
import { request as httpRequest, type IncomingMessage } from 'node:http'
import { request as httpsRequest } from 'node:https'
import type { LookupFunction } from 'node:net'
import { AtollError, type ErrorCode } from '@atoll/core'
import { checkedAddresses, type LookupAll, type ResolvedAddress } from './import-address.ts'
import { JobInterrupted } from './job-kind.ts'
import type { SetTimer } from './timers.ts'

export interface FetchPolicy {
  /** Whether addresses that are not public may be connected to. */
  allowPrivate: boolean
  lookup: LookupAll
  setTimer: SetTimer
  /** For resolving, connecting and the header of the answer together. */
  headerTimeoutMs: number
  /** In this time at least `bytesPerIdleTimeMin` must arrive. */
  idleTimeoutMs: number
}

export const defaultHeaderTimeoutMs = 30_000
export const defaultIdleTimeoutMs = 60_000
const bytesPerIdleTimeMin = 64 * 1024
const redirectsMax = 5
/** Codes of OpenSSL and Node for a certificate that is not trusted; trying again changes nothing. */
const certificateFailures = /CERT|^UNABLE_TO_|^ERR_TLS_|SELF_SIGNED/

/** The connection failed in a way that may be over in a moment. */
export class TransientFetchFailure extends Error {
  constructor(message: string, cause?: unknown) {
    super(message, { cause })
    this.name = 'TransientFetchFailure'
  }
}

/** Where to go on, and how the server knows that the content is still the same. */
export interface FetchRange {
  startBytes: number
  /** A strong ETag or a date, for If-Range. */
  validator: string
}

export interface FetchedBody {
  /** 0: from the beginning, whatever range was asked for. */
  readonly startBytes: number
  /** Of the whole resource; null: not known before its end. */
  readonly totalBytes: number | null
  /** For a later range; null: the server offers none. */
  readonly validator: string | null
  /** The next bytes, null at the marked end. @throws TransientFetchFailure, JobInterrupted */
  next(): Promise<Buffer | null>
  /** Ends the connection. */
  close(): void
}

/**
 * Checks a URL by itself.
 * @throws AtollError IMAGE_SOURCE_INVALID
 */
export function parseHttpUrl(text: string): URL {
  const url = URL.canParse(text) ? new URL(text) : null
  if (url !== null && (url.protocol === 'http:' || url.protocol === 'https:') && url.hostname !== '') {
    url.hash = ''
    return url
  }
  throw new AtollError(
    'IMAGE_SOURCE_INVALID',
    'the source is no URL that can be fetched: http://HOST/PATH or https://HOST/PATH is wanted',
    {},
  )
}

/** The URL as it may be shown and stored: without user, password and query, which may all be secrets. */
export function shownUrl(url: URL): string {
  return `${url.origin}${url.pathname}`
}

/**
 * Asks for the resource, from `range` on if the server can.
 * @throws AtollError IMAGE_SOURCE_FORBIDDEN, IMAGE_FETCH_FAILED when trying again is of no use
 * @throws TransientFetchFailure, JobInterrupted
 */
export async function openHttp(
  url: URL,
  range: FetchRange | null,
  policy: FetchPolicy,
  signal: AbortSignal,
): Promise<FetchedBody> {
  let current = url
  for (let redirects = 0; ; redirects++) {
    const response = await ask(current, range, policy, signal)
    const status = response.statusCode ?? 0
    if (status === 200 || status === 206) return bodyOf(response, current, range, policy, signal)
    response.destroy()
    if (status === 416 && range !== null) {
      range = null
      continue
    }
    const { location } = response.headers
    if (status >= 300 && status < 400 && location !== undefined) {
      if (redirects >= redirectsMax) throw failed(current, `the server redirects more than ${redirectsMax} times`, status)
      current = redirected(current, location)
      continue
    }
    const why = `the server answered ${status} ${response.statusMessage ?? ''}`.trimEnd()
    if (status >= 500 || status === 408 || status === 425 || status === 429) throw new TransientFetchFailure(why)
    throw failed(current, why, status)
  }
}

function redirected(from: URL, location: string): URL {
  const to = URL.canParse(location, from) ? new URL(location, from) : null
  if (to === null) throw failed(from, 'the server redirects to something that is no URL', 0)
  if (to.origin !== from.origin) {
    throw new AtollError(
      'IMAGE_SOURCE_FORBIDDEN',
      `${shownUrl(from)} redirects to ${to.origin}: redirects to other hosts are not followed; name that source itself`,
      { values: { source: shownUrl(from), origin: to.origin } },
    )
  }
  to.username = from.username
  to.password = from.password
  to.hash = ''
  return to
}

async function ask(url: URL, range: FetchRange | null, policy: FetchPolicy, signal: AbortSignal): Promise<IncomingMessage> {
  if (signal.aborted) throw new JobInterrupted()
  const controller = new AbortController()
  const abort = (): void => controller.abort()
  signal.addEventListener('abort', abort, { once: true })
  let timedOut = false
  const cancel = policy.setTimer(() => {
    timedOut = true
    controller.abort()
  }, policy.headerTimeoutMs)
  try {
    const addresses = await unlessAborted(checkedAddresses(url.hostname, policy.allowPrivate, policy.lookup), controller.signal)
    let failure: unknown = new Error(`${url.hostname} has no address`)
    for (const address of addresses) {
      try {
        return await send(url, range, address, controller.signal)
      } catch (error) {
        failure = error
        if (controller.signal.aborted) break
      }
    }
    throw failure
  } catch (error) {
    if (signal.aborted) throw new JobInterrupted()
    if (error instanceof AtollError) throw error
    if (timedOut) throw new TransientFetchFailure(`the server did not answer in ${policy.headerTimeoutMs / 1000} s`, error)
    const code = (error as NodeJS.ErrnoException).code ?? ''
    if (certificateFailures.test(code)) throw failed(url, `its certificate is refused: ${(error as Error).message}`, 0)
    if (code === 'ENOTFOUND') throw failed(url, `there is no host ${url.hostname}`, 0)
    throw new TransientFetchFailure((error as Error).message, error)
  } finally {
    cancel()
    signal.removeEventListener('abort', abort)
  }
}

/** One request to one address. Nothing of a failure that follows the header comes out here. */
async function send(url: URL, range: FetchRange | null, pinned: ResolvedAddress, signal: AbortSignal): Promise<IncomingMessage> {
  const lookup: LookupFunction = (_host, options, callback) => {
    if (options.all === true) callback(null, [pinned])
    else callback(null, pinned.address, pinned.family)
  }
  const headers = {
    'user-agent': 'atoll',
    accept: '*/*',
    'accept-encoding': 'identity',
    ...(range === null ? {} : { range: `bytes=${range.startBytes}-`, 'if-range': range.validator }),
  }
  const { promise, resolve, reject } = Promise.withResolvers<IncomingMessage>()
  const request = (url.protocol === 'https:' ? httpsRequest : httpRequest)(url, { method: 'GET', agent: false, headers, lookup })
  const abort = (): void => void request.destroy(new Error('the request was called off'))
  signal.addEventListener('abort', abort, { once: true })
  // Kept for the life of the request: an error that nobody listens for would end the process.
  request.on('error', reject)
  request.once('response', (response) => {
    response.on('error', () => undefined)
    resolve(response)
  })
  request.end()
  try {
    return await promise
  } finally {
    signal.removeEventListener('abort', abort)
  }
}

function bodyOf(
  response: IncomingMessage,
  url: URL,
  range: FetchRange | null,
  policy: FetchPolicy,
  signal: AbortSignal,
): FetchedBody {
  try {
    const { headers } = response
    const coding = headers['content-encoding']
    if (coding !== undefined && coding.toLowerCase() !== 'identity') {
      throw failed(url, `the server sends the content as ${JSON.stringify(coding)}, which was not asked for`, 0)
    }
    const { startBytes, totalBytes } = placeOf(response, url, range)
    if (totalBytes === null && headers['transfer-encoding'] === undefined) {
      throw failed(
        url,
        'the server marks no end of the content (neither Content-Length nor chunks), so a broken transfer could not be told',
        0,
      )
    }
    return { startBytes, totalBytes, validator: validatorOf(headers), ...readerOf(response, policy, signal) }
  } catch (error) {
    response.destroy()
    throw error
  }
}

function placeOf(
  response: IncomingMessage,
  url: URL,
  range: FetchRange | null,
): { startBytes: number; totalBytes: number | null } {
  const length = lengthOf(response.headers['content-length'])
  if (response.statusCode !== 206) return { startBytes: 0, totalBytes: length }
  const match = /^bytes (\d+)-(\d+)\/(\d+)$/.exec(response.headers['content-range'] ?? '')
  const [first, last, total] = [lengthOf(match?.[1]), lengthOf(match?.[2]), lengthOf(match?.[3])]
  if (range === null || first !== range.startBytes || last === null || total === null || last !== total - 1) {
    throw failed(
      url,
      `the server answered with a part that was not asked for: ${response.headers['content-range'] ?? 'no Content-Range'}`,
      206,
    )
  }
  return { startBytes: first, totalBytes: total }
}

function lengthOf(text: string | undefined): number | null {
  const value = text === undefined || !/^\d{1,16}$/.test(text) ? Number.NaN : Number(text)
  return Number.isSafeInteger(value) ? value : null
}

/** A weak ETag does not promise the same bytes. */
function validatorOf(headers: IncomingMessage['headers']): string | null {
  if (headers['accept-ranges']?.toLowerCase() === 'none') return null
  const { etag } = headers
  if (etag?.startsWith('"') === true) return etag
  return etag === undefined ? (headers['last-modified'] ?? null) : null
}

function readerOf(response: IncomingMessage, policy: FetchPolicy, signal: AbortSignal): Pick<FetchedBody, 'next' | 'close'> {
  const iterator = response[Symbol.asyncIterator]() as AsyncIterator<Buffer>
  let windowBytes = 0
  let isSlow = false
  const watch = (): (() => void) => {
    windowBytes = 0
    return policy.setTimer(() => {
      isSlow = true
      response.destroy(new Error('too slow'))
    }, policy.idleTimeoutMs)
  }
  let cancel = watch()
  const abort = (): void => void response.destroy(new JobInterrupted())
  signal.addEventListener('abort', abort, { once: true })
  const close = (): void => {
    cancel()
    signal.removeEventListener('abort', abort)
    response.destroy()
  }
  const next = async (): Promise<Buffer | null> => {
    let step: IteratorResult<Buffer>
    try {
      step = await iterator.next()
    } catch (error) {
      if (signal.aborted) throw new JobInterrupted()
      if (isSlow) {
        throw new TransientFetchFailure(
          `the server sent less than ${bytesPerIdleTimeMin} bytes in ${policy.idleTimeoutMs / 1000} s`,
          error,
        )
      }
      throw new TransientFetchFailure(`the connection broke: ${(error as Error).message}`, error)
    }
    if (signal.aborted) throw new JobInterrupted()
    if (step.done === true) {
      if (!response.complete) throw new TransientFetchFailure('the connection broke before the end')
      return null
    }
    windowBytes += step.value.length
    if (windowBytes >= bytesPerIdleTimeMin) {
      cancel()
      cancel = watch()
    }
    return step.value
  }
  return { next, close }
}

async function unlessAborted<T>(promise: Promise<T>, signal: AbortSignal): Promise<T> {
  const aborted = Promise.withResolvers<never>()
  const abort = (): void => aborted.reject(new Error('the request was called off'))
  if (signal.aborted) abort()
  signal.addEventListener('abort', abort, { once: true })
  try {
    return await Promise.race([promise, aborted.promise])
  } finally {
    signal.removeEventListener('abort', abort)
  }
}

function failed(url: URL, why: string, status: number): AtollError {
  const code: ErrorCode = 'IMAGE_FETCH_FAILED'
  return new AtollError(code, `${shownUrl(url)} cannot be fetched: ${why}`, { values: { source: shownUrl(url), status } })
}
