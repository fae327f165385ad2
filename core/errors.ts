/**
 * The errors of the project. Callers match `code`, never the message.
 *
 * A subclass exists only where a caller acts differently and wants `instanceof`; everything else is an `AtollError` with
 * its code. Codes, what to do about them and their HTTP status stand in error-catalogue.ts.
 */
import { errorCatalogue, findErrorEntry, type ErrorCode } from './error-catalogue.ts'

/** What was wrong and the bound it broke; crosses the native boundary and the admin socket as JSON. */
export type ErrorValues = Readonly<Record<string, string | number | boolean | null | readonly string[]>>

export interface AtollErrorOptions {
  values?: ErrorValues
  cause?: unknown
  /** Only where it differs from the catalogue's answer. */
  retryable?: boolean
}

/** An error as data: what crosses the admin socket and what jobs record. */
export interface ErrorData {
  code: string
  message: string
  values: ErrorValues
  retryable: boolean
}

export class AtollError extends Error {
  /** Stable, SCREAMING_SNAKE_CASE, in the catalogue. */
  readonly code: ErrorCode
  /** Whether the same call may succeed later without anything else being changed. */
  readonly retryable: boolean
  readonly values: ErrorValues
  readonly httpStatus: number

  /**
   * @param code an entry of the catalogue
   * @param message what was wrong, with the value, the limit and what to do; without the code
   */
  constructor(code: ErrorCode, message: string, options: AtollErrorOptions = {}) {
    super(message, options.cause === undefined ? undefined : { cause: options.cause })
    this.name = new.target.name
    const entry = errorCatalogue[code]
    this.code = code
    this.retryable = options.retryable ?? entry.retryable
    this.values = options.values ?? {}
    this.httpStatus = entry.httpStatus
  }

  /** The error without its stack and cause, for another process. */
  toData(): ErrorData {
    return { code: this.code, message: this.message, values: this.values, retryable: this.retryable }
  }

  /** Turns data that came from another process or from native code back into an error; an unknown code becomes INTERNAL. */
  static fromData(data: { code: string; message: string; values?: ErrorValues; retryable?: boolean }): AtollError {
    if (findErrorEntry(data.code) === undefined) {
      return new AtollError('INTERNAL', `${data.code}: ${data.message}`, { values: { ...data.values, unknownCode: data.code } })
    }
    const options: AtollErrorOptions = { values: data.values ?? {} }
    if (data.retryable !== undefined) options.retryable = data.retryable
    return data.code === 'NO_SPACE'
      ? new NoSpaceError(data.message, options)
      : new AtollError(data.code as ErrorCode, data.message, options)
  }
}

/** The backend or the catalog is full: the caller may release a reserve and try once more, or pause. */
export class NoSpaceError extends AtollError {
  constructor(message: string, options: AtollErrorOptions = {}) {
    super('NO_SPACE', message, options)
  }
}

/** Whether `error` is an error of ours, with the given code if one is given. */
export function isAtollError(error: unknown, code?: ErrorCode): error is AtollError {
  return error instanceof AtollError && (code === undefined || error.code === code)
}

/** Any thrown value as an error of ours: what is not one yet becomes INTERNAL with the original as its cause. */
export function toAtollError(error: unknown): AtollError {
  if (error instanceof AtollError) return error
  const message = error instanceof Error ? error.message : String(error)
  return new AtollError('INTERNAL', message, { cause: error })
}

/** Stops where our own reasoning was wrong: a defect, not the world's fault. */
export function assert(condition: unknown, message: string): asserts condition {
  if (!condition) throw new AtollError('INTERNAL', `assertion failed: ${message}`)
}
