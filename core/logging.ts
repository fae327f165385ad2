/** Logs go to stderr as JSON lines (pino); stdout belongs to what was asked for. Secrets never reach them. */
import { destination, type Level, type Logger, pino, type LoggerOptions } from 'pino'
import { isAtollError } from './errors.ts'

export type { Logger }
export const logLevels = ['trace', 'debug', 'info', 'warn', 'error', 'fatal'] as const satisfies readonly Level[]
export type LogLevel = (typeof logLevels)[number] | 'silent'

/** Fields with these names are secrets wherever they stand, up to three levels deep. */
const secretNames = ['password', 'secret', 'token', 'chapSecret', 'authorization', 'cookie', 'privateKey'] as const
const redactPaths = secretNames.flatMap((name) => [name, `*.${name}`, `*.*.${name}`, `*.*.*.${name}`])

/** The secret in URIs such as iscsi://USER%SECRET@HOST and http://USER:SECRET@HOST. */
const uriSecretPattern = /([a-z][a-z0-9+.-]*:\/\/[^\s/@:%]*)[:%][^\s/@]+@/gi

/** `text` with the secrets in its URIs replaced. */
export function redactUris(text: string): string {
  return text.replaceAll(uriSecretPattern, '$1:[redacted]@')
}

function redactDeep(value: unknown, depth = 0): unknown {
  if (typeof value === 'string') return redactUris(value)
  if (value === null || typeof value !== 'object' || depth > 3) return value
  if (Array.isArray(value)) return value.map((item) => redactDeep(item, depth + 1))
  if (Object.getPrototypeOf(value) !== Object.prototype) return value
  return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, redactDeep(item, depth + 1)]))
}

function serializeError(error: unknown): unknown {
  if (!(error instanceof Error)) return error
  return {
    type: error.name,
    message: redactUris(error.message),
    ...(isAtollError(error) ? { code: error.code, values: redactDeep(error.values) } : {}),
    stack: redactUris(error.stack ?? ''),
    ...(error.cause === undefined ? {} : { cause: serializeError(error.cause) }),
  }
}

export interface LogOptions {
  /** Default 'info'. */
  level?: LogLevel
  /** Where lines go; default stderr. For tests. */
  write?: (line: string) => void
}

/** Makes the root logger. Log errors as `log.error({ err: error }, 'what failed')`. */
export function createLog(options: LogOptions = {}): Logger {
  const { write } = options
  const settings: LoggerOptions = {
    level: options.level ?? 'info',
    base: { pid: process.pid },
    redact: { paths: redactPaths, censor: '[redacted]' },
    serializers: { err: serializeError, error: serializeError },
    formatters: { log: (fields) => redactStrings(fields) },
  }
  // Synchronous: the last lines before an end are the ones that matter.
  return pino(settings, write === undefined ? destination({ fd: 2, sync: true }) : { write })
}

/** Strings of a line are searched for URIs; errors are left to their serializer. */
function redactStrings(fields: Record<string, unknown>): Record<string, unknown> {
  return Object.fromEntries(
    Object.entries(fields).map(([name, value]) => [name, value instanceof Error ? value : redactDeep(value)]),
  )
}

/** A logger that says nothing. */
export function silentLog(): Logger {
  return createLog({ level: 'silent' })
}
