import { readFile } from 'node:fs/promises'
import { resolve } from 'node:path'
import { CliError } from '../client/cli-error.ts'

/** Options whose value is a path, of every driver that has them: the daemon may run elsewhere, so the path is made absolute here. */
const pathOptions: ReadonlySet<string> = new Set(['path', 'conf', 'keyring'])

/**
 * Turns `KEY=VALUE` and `KEY=@FILE` into a record. Secrets come from files, since arguments can be read by every user
 * of the machine; one line feed at the end of the file is not part of the value.
 * @throws CliError IO_ERROR when a file cannot be read
 */
export async function readOptions(pairs: readonly string[]): Promise<Record<string, string>> {
  const options: Record<string, string> = {}
  for (const pair of pairs) {
    const key = pair.slice(0, pair.indexOf('='))
    const value = pair.slice(key.length + 1)
    options[key] = value.startsWith('@') ? await readValue(value.slice(1)) : value
    if (pathOptions.has(key)) options[key] = resolve(options[key])
  }
  return options
}

async function readValue(path: string): Promise<string> {
  try {
    return (await readFile(path, 'utf8')).replace(/\r?\n$/, '')
  } catch (error) {
    throw new CliError('IO_ERROR', `cannot read ${path}: ${error instanceof Error ? error.message : String(error)}`)
  }
}
