/** A failure as the user sees it: a code for scripts, a sentence for people, and the exit code of the process. */
export class CliError extends Error {
  /** SCREAMING_SNAKE_CASE; the codes are those of core's error catalogue. */
  readonly code: string
  readonly exitCode: 1 | 2

  constructor(code: string, message: string, exitCode: 1 | 2 = 1) {
    super(message)
    this.name = 'CliError'
    this.code = code
    this.exitCode = exitCode
  }
}

/** An argument that cannot be meant, noticed before anything is sent: exit code 2. */
export function usageError(message: string): CliError {
  return new CliError('USAGE', message, 2)
}
