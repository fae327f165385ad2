import { errnoNames, nameOf, optionReply } from './protocol.ts'

/** What callers match; messages are for people and may change. */
export type NbdErrorCode =
  /** The URI or the target cannot be understood. */
  | 'NBD_URI_INVALID'
  /** `nbds://` and `nbds+unix://`: this client speaks plain NBD only. */
  | 'NBD_TLS_UNSUPPORTED'
  /** No connection came about; `cause` has the reason. */
  | 'NBD_CONNECT_FAILED'
  /** Connecting and negotiating took longer than `connectTimeoutMs`. */
  | 'NBD_CONNECT_TIMEOUT'
  /** The caller's signal was aborted. */
  | 'NBD_ABORTED'
  /** The server refused an option; see `NbdOptionError`. */
  | 'NBD_OPTION_REFUSED'
  /** The peer sent what the protocol forbids. The connection is closed. */
  | 'NBD_PROTOCOL'
  /** The peer is an oldstyle server, or an export is larger than 2^53 bytes. */
  | 'NBD_UNSUPPORTED'
  /** The connection ended with the request unanswered: whether it was done is unknown. */
  | 'NBD_CONNECTION_LOST'
  /** The request came after `disconnect()` or after the connection had ended. Nothing was sent. */
  | 'NBD_CLOSED'
  /** The server answered with an errno; see `NbdReplyError`. */
  | 'NBD_REQUEST_FAILED'
  /** Offset, length or flags of a request cannot be sent. Nothing was sent. */
  | 'NBD_REQUEST_INVALID'
  /** The server has not offered this command or flag. Nothing was sent. */
  | 'NBD_NOT_OFFERED'
  /** More requests are waiting than `waitingMax`. Nothing was sent. */
  | 'NBD_QUEUE_FULL'
  /** `connectWithRetry`: no connection until the deadline; `cause` is the last failure. */
  | 'NBD_RETRY_EXHAUSTED'
  /** A raw `receive` got nothing in time. */
  | 'NBD_RECEIVE_TIMEOUT'

/** Every failure of this package. */
export class NbdError extends Error {
  readonly code: NbdErrorCode
  /** The same call may succeed over a new connection. */
  readonly retryable: boolean
  /** errno of the server's answer, as the protocol numbers it; null when no answer is behind this. */
  readonly errno: number | null = null
  /** `EPERM`, `EIO`, `ENOMEM`, `EINVAL`, `ENOSPC`, `EOVERFLOW`, `ENOTSUP`, `ESHUTDOWN`, or `UNKNOWN_<number>`. */
  readonly errnoName: string | null = null

  constructor(code: NbdErrorCode, message: string, options: { cause?: unknown; retryable?: boolean } = {}) {
    super(message, options.cause === undefined ? undefined : { cause: options.cause })
    this.name = 'NbdError'
    this.code = code
    this.retryable = options.retryable ?? retryableCodes.has(code)
  }
}

const retryableCodes: ReadonlySet<NbdErrorCode> = new Set<NbdErrorCode>([
  'NBD_CONNECT_FAILED',
  'NBD_CONNECT_TIMEOUT',
  'NBD_CONNECTION_LOST',
  'NBD_CLOSED',
])

/** The server answered a request with an errno. */
export class NbdReplyError extends NbdError {
  override readonly errno: number
  override readonly errnoName: string
  /** The server's own words, if it sent any. */
  readonly serverMessage: string | null
  /** Where in the request it failed, if the server said so. */
  readonly offsetBytes: number | null

  constructor(what: string, errno: number, serverMessage: string | null, offsetBytes: number | null) {
    const errnoName = errnoNames[errno] ?? `UNKNOWN_${errno}`
    const where = offsetBytes === null ? '' : ` at offset ${offsetBytes}`
    super('NBD_REQUEST_FAILED', `${what} failed${where}: ${errnoName}${serverMessage ? ` (${serverMessage})` : ''}`, {
      // The server is stopping; another one may take its place at the same address.
      retryable: errnoName === 'ESHUTDOWN',
    })
    this.name = 'NbdReplyError'
    this.errno = errno
    this.errnoName = errnoName
    this.serverMessage = serverMessage
    this.offsetBytes = offsetBytes
  }
}

/** The server refused an option of the negotiation. */
export class NbdOptionError extends NbdError {
  /** Number of the reply, 2^31 and more. */
  readonly replyType: number
  /** Its name, such as `errorUnknown` (no such export). */
  readonly replyName: string
  readonly serverMessage: string | null

  constructor(what: string, replyType: number, serverMessage: string | null) {
    const replyName = nameOf(optionReply, replyType)
    super('NBD_OPTION_REFUSED', `the server refused ${what}: ${replyName}${serverMessage ? ` (${serverMessage})` : ''}`, {
      retryable: replyType === optionReply.errorShutdown,
    })
    this.name = 'NbdOptionError'
    this.replyType = replyType
    this.replyName = replyName
    this.serverMessage = serverMessage
  }
}
