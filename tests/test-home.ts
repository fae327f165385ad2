// The real daemon and the real CLI as processes of their own, started through `./atoll` like a user does.
import { execFile, spawn, spawnSync } from 'node:child_process'
import type { ChildProcess, ChildProcessByStdio } from 'node:child_process'
import { closeSync, openSync } from 'node:fs'
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import type { Readable } from 'node:stream'
import { promisify } from 'node:util'

export const repositoryRoot = join(import.meta.dirname, '..')
export const atollPath = join(repositoryRoot, 'atoll')

const execFileAsync = promisify(execFile)

/** Less than a test's limit (vitest.config.ts). */
const hangLimitMs = 500_000

export interface CommandResult {
  readonly exitCode: number | null
  readonly stdout: string
  readonly stderr: string
}

/** What `serve --json` prints. */
export interface Ready {
  readonly ready: boolean
  readonly http: string | null
  readonly nbd: string | null
  readonly nbdSocket: string | null
  readonly iscsi: string | null
  readonly home: string
  readonly pid: number
}

/** A home, and at most one daemon in it. `await using` ends the daemon and removes the home if it is a temporary one. */
export class TestHome {
  readonly path: string
  private readonly isTemporary: boolean
  private readonly logPath: string
  private daemon: ChildProcess | null = null
  private exit: Promise<number | null> = Promise.resolve(null)

  private constructor(path: string, options: { isTemporary: boolean; logPath: string }) {
    this.path = path
    this.isTemporary = options.isTemporary
    this.logPath = options.logPath
  }

  static async create(): Promise<TestHome> {
    // Short, because the path of a socket has 107 bytes.
    const path = await mkdtemp(join(tmpdir(), 'atoll-'))
    return new TestHome(path, { isTemporary: true, logPath: join(path, 'log') })
  }

  /** A home at a path of the caller's, who removes it; `logPath` (default: `log` in the home) is what its daemons append to. */
  static at(path: string, options: { logPath?: string } = {}): TestHome {
    return new TestHome(path, { isTemporary: false, logPath: options.logPath ?? join(path, 'log') })
  }

  /** Starts a daemon on a free port and waits until it says that it is ready. */
  async start(...options: string[]): Promise<Ready> {
    if (this.daemon !== null) throw new Error('the daemon of this home runs already')
    const log = openSync(this.logPath, 'a')
    const args = ['serve', '--json', '--http', ':0', '--home', this.path, ...options]
    const daemon = spawn(atollPath, args, { stdio: ['ignore', 'pipe', log], cwd: tmpdir() }) as ChildProcessByStdio<
      null,
      Readable,
      null
    >
    closeSync(log)
    this.daemon = daemon
    const ended = Promise.withResolvers<number | null>()
    daemon.once('error', ended.reject)
    daemon.once('exit', (code) => ended.resolve(code))
    this.exit = ended.promise
    for await (const line of createInterface({ input: daemon.stdout })) return JSON.parse(line) as Ready
    this.daemon = null
    throw new Error(`the daemon ended with ${await this.exit} before it was ready:\n${await this.log()}`)
  }

  /** Sends a signal and waits for the end; returns the exit code (null: the signal itself ended it). */
  async end(signal: NodeJS.Signals = 'SIGTERM'): Promise<number | null> {
    this.daemon?.kill(signal)
    const code = await this.exit
    this.daemon = null
    return code
  }

  /** Resolves when the daemon has ended by itself. */
  async ended(): Promise<number | null> {
    const code = await this.exit
    this.daemon = null
    return code
  }

  /** Everything that the daemons of this home have logged. */
  async log(): Promise<string> {
    return await readFile(this.logPath, 'utf8')
  }

  /** Runs a command against this home. */
  run(...args: string[]): CommandResult {
    return this.runWith({}, ...args)
  }

  runWith(options: { input?: string | Uint8Array; cwd?: string }, ...args: string[]): CommandResult {
    return runProgram(atollPath, args, { ...options, env: { ATOLL_HOME: this.path } })
  }

  /** Runs a command that must succeed; returns what it printed, without the last line feed. */
  cli(...args: string[]): string {
    return succeed(`atoll ${args.join(' ')}`, this.run(...args))
  }

  /** Runs a command with `--json` that must succeed. */
  json<T>(...args: string[]): T {
    return JSON.parse(this.cli(...args, '--json')) as T
  }

  /** As `json`, while this process goes on: for tests whose clients are connected meanwhile. */
  async jsonMeanwhile<T>(...args: string[]): Promise<T> {
    const { stdout } = await execFileAsync(atollPath, [...args, '--home', this.path, '--json'], { maxBuffer: 64 * 1024 * 1024 })
    return JSON.parse(stdout) as T
  }

  /**
   * Takes snapshots while clients work. A machine that holds requests up for longer than a snapshot waits for them refuses it, with
   * nothing changed: then once more.
   */
  async snapshotMeanwhile(...snapshots: string[]): Promise<void> {
    for (;;) {
      try {
        await this.jsonMeanwhile('snapshot', 'create', ...snapshots)
        return
      } catch (error) {
        if (!String(error).includes('atoll: SNAPSHOT_BUSY:')) throw error
      }
    }
  }

  /** Runs a command that must fail with exit code 1; returns the code in its message. */
  fail(...args: string[]): string {
    return this.failure(...args).code
  }

  /** As `fail`, with the message. */
  failure(...args: string[]): { code: string; message: string } {
    const result = this.run(...args)
    const [, code, message] = /^atoll: ([A-Z_]+): (.*)/s.exec(result.stderr) ?? []
    if (result.exitCode !== 1 || code === undefined || message === undefined || result.stdout !== '') {
      throw new Error(`atoll ${args.join(' ')} should fail with a code: ${JSON.stringify(result)}`)
    }
    return { code, message }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.end('SIGKILL')
    if (this.isTemporary) await rm(this.path, { recursive: true, force: true })
  }
}

export function runProgram(
  command: string,
  args: readonly string[],
  options: { input?: string | Uint8Array; cwd?: string; env?: Record<string, string> } = {},
): CommandResult {
  const result = spawnSync(command, args, {
    encoding: 'utf8',
    input: options.input,
    cwd: options.cwd,
    env: { ...process.env, PATH: `${process.env['PATH'] ?? ''}:/usr/sbin:/sbin`, ...options.env },
    maxBuffer: 64 * 1024 * 1024,
    // Meanwhile no timer of ours fires, so that a test's own limit would never come.
    timeout: hangLimitMs,
    killSignal: 'SIGKILL',
  })
  // A program that has seen enough does not read its input to the end; its exit code says what it thought of it.
  const { code } = (result.error ?? {}) as NodeJS.ErrnoException
  if (result.error !== undefined && code !== 'EPIPE') throw result.error
  return { exitCode: result.status, stdout: result.stdout, stderr: result.stderr }
}

/** What a program printed, if it succeeded. */
export function succeed(what: string, result: CommandResult): string {
  if (result.exitCode !== 0) throw new Error(`${what} ended with ${result.exitCode}: ${result.stderr}${result.stdout}`)
  return result.stdout.trimEnd()
}
