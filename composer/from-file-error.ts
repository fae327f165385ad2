import { AtollError, NoSpaceError } from '@atoll/core'

/** A failure of Node's file functions as an error of ours; anything else as it is. */
export function fromFileError(error: unknown): unknown {
  if (!(error instanceof Error) || error instanceof AtollError) return error
  const { code, path, syscall } = error as NodeJS.ErrnoException
  if (code === undefined || syscall === undefined) return error
  const options = { values: { errno: code, syscall, path: path ?? null }, cause: error }
  return code === 'ENOSPC' || code === 'EDQUOT'
    ? new NoSpaceError(error.message, options)
    : new AtollError('IO_ERROR', error.message, options)
}
