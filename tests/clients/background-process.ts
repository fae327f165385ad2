import { spawn } from 'node:child_process'
import type { ChildProcess } from 'node:child_process'
import { holdsWithin } from '../holds-within.ts'

const keptOutputBytes = 8192
const limitMs = 300_000

/**
 * A program that runs while a test does: a server in front of us, a file system, a virtual machine. `await using` kills it if it
 * still runs. Whoever waits for one of its deeds uses `until`, which fails at once when it ends.
 */
export class BackgroundProcess {
  readonly command: string
  /** Code or signal with which it ended. */
  readonly ended: Promise<number | NodeJS.Signals>
  private readonly child: ChildProcess
  private complaint = ''
  private hasEnded = false

  constructor(command: string, args: readonly string[], options: { input?: 'pipe'; onOutput?: (text: string) => void } = {}) {
    this.command = command
    this.child = spawn(command, args, {
      stdio: [options.input ?? 'ignore', 'pipe', 'pipe'],
      env: { ...process.env, PATH: `${process.env['PATH'] ?? ''}:/usr/sbin:/sbin` },
    })
    const ended = Promise.withResolvers<number | NodeJS.Signals>()
    this.ended = ended.promise
    this.child.once('error', (error) => {
      this.complaint += error.message
      this.hasEnded = true
      ended.resolve(127)
    })
    // `close`, not `exit`: what it printed last is known by then.
    this.child.once('close', (code, signal) => {
      this.hasEnded = true
      ended.resolve(code ?? signal ?? 127)
    })
    this.child.stdin?.on('error', () => {})
    this.child.stdout?.setEncoding('utf8')
    this.child.stderr?.setEncoding('utf8')
    this.child.stdout?.on('data', (text: string) => options.onOutput?.(text))
    this.child.stderr?.on('data', (text: string) => {
      this.complaint = (this.complaint + text).slice(-keptOutputBytes)
    })
  }

  /** The end of what it wrote to standard error. */
  get errors(): string {
    return this.complaint
  }

  write(text: string): void {
    this.child.stdin?.write(text)
  }

  /** Nothing more comes on its standard input. */
  closeInput(): void {
    this.child.stdin?.end()
  }

  /** Waits until `condition` holds; fails when the process ends first, or after five minutes, which no machine takes that only is busy. */
  async until(what: string, condition: () => boolean | Promise<boolean>): Promise<void> {
    const came = await holdsWithin(limitMs, async () => {
      // Before the condition is asked: what it did last still counts.
      const hadEnded = this.hasEnded
      if (await condition()) return true
      if (hadEnded) throw new Error(`${this.command} ended (${await this.ended}) before ${what}: ${this.complaint}`)
      return false
    })
    if (!came) throw new Error(`${this.command}: not ${what} within ${limitMs} ms: ${this.complaint}`)
  }

  /** Sends a signal if it still runs, and waits for its end. */
  async end(signal: NodeJS.Signals = 'SIGTERM'): Promise<number | NodeJS.Signals> {
    if (!this.hasEnded) this.child.kill(signal)
    return await this.ended
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.end('SIGKILL')
  }
}
