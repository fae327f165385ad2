/**
 * The one function that turns a failure of the addon into an error of ours. Failures cross as JSON in the message of a
 * plain Error ({ code, message, values }); anything else is a wrong argument or a defect.
 */
import { AtollError, type ErrorValues } from '@atoll/core'

/** Codes that the addon's glue gives to arguments of a wrong kind. */
const argumentCodes = new Set([
  'InvalidArg',
  'ObjectExpected',
  'StringExpected',
  'NameExpected',
  'FunctionExpected',
  'NumberExpected',
  'BooleanExpected',
  'ArrayExpected',
  'BigintExpected',
  'ArrayBufferExpected',
  'InvalidArg',
])

/** What the addon threw, as an `AtollError`; the original is its cause. */
export function fromNative(error: unknown): AtollError {
  if (error instanceof AtollError) return error
  if (!(error instanceof Error)) return new AtollError('INTERNAL', String(error), { cause: error })
  const data = parse(error.message)
  if (data !== null) {
    const converted = AtollError.fromData(data)
    converted.cause = error
    return converted
  }
  const code =
    'code' in error && typeof error.code === 'string' && argumentCodes.has(error.code) ? 'ARGUMENT_INVALID' : 'INTERNAL'
  return new AtollError(code, error.message, { cause: error })
}

function parse(message: string): { code: string; message: string; values: ErrorValues } | null {
  if (!message.startsWith('{"code":')) return null
  try {
    return JSON.parse(message) as { code: string; message: string; values: ErrorValues }
  } catch {
    return null
  }
}

/** Runs a synchronous call of the addon. */
export function call<T>(body: () => T): T {
  try {
    return body()
  } catch (error) {
    throw fromNative(error)
  }
}

/** Runs a call of the addon that returns a promise. */
export async function settle<T>(body: () => Promise<T>): Promise<T> {
  try {
    return await body()
  } catch (error) {
    throw fromNative(error)
  }
}
