import { execFile } from 'node:child_process'
import { promisify } from 'node:util'

const execFileAsync = promisify(execFile)

/**
 * What a program printed, if it succeeded; its own words are in the error if it did not. This process goes on meanwhile, so it may
 * be the one that the program waits for.
 */
export async function runClient(command: string, ...args: readonly string[]): Promise<string> {
  const { stdout } = await execFileAsync(command, args, {
    maxBuffer: 64 * 1024 * 1024,
    timeout: 300_000,
    env: { ...process.env, PATH: `${process.env['PATH'] ?? ''}:/usr/sbin:/sbin` },
  })
  return stdout
}

/** The exit code and everything printed, whatever the code is. */
export async function clientOutcome(command: string, ...args: readonly string[]): Promise<{ exitCode: number; output: string }> {
  try {
    return { exitCode: 0, output: await runClient(command, ...args) }
  } catch (error) {
    const { code, stdout, stderr } = error as { code?: number | string; stdout?: string; stderr?: string }
    if (typeof code !== 'number') throw error
    return { exitCode: code, output: `${stdout ?? ''}${stderr ?? ''}` }
  }
}
