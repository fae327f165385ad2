// Starts the real CLI the way a user does: a test runner compiles what it loads and would hide what Node cannot strip.
import { spawn, spawnSync } from 'node:child_process'
import type { ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempSync, readdirSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'

const root = join(import.meta.dirname, '..')
const atoll = join(root, 'atoll')
const home = mkdtempSync(join(tmpdir(), 'atoll-smoke-'))
const readyTimeoutMs = 300_000
/** What the README promises. */
const statusMsMax = 200
const secondStartMsMax = 2000
let daemon: ChildProcess | undefined

function cli(...args: string[]): string {
  const result = spawnSync(atoll, args, { encoding: 'utf8', env: { ...process.env, ATOLL_HOME: home } })
  if (result.status !== 0) throw new Error(`atoll ${args.join(' ')} ended with ${result.status}: ${result.stderr}`)
  return result.stdout
}

/** Starts the daemon; returns how long it took to be ready. */
async function start(): Promise<number> {
  const startedAtMs = performance.now()
  const started = spawn(atoll, ['serve', '--json', '--http', ':0', '--home', home], { stdio: ['ignore', 'pipe', 'ignore'] })
  daemon = started
  const timer = setTimeout(() => started.kill('SIGKILL'), readyTimeoutMs)
  let ready: { ready?: boolean; pid?: number } | undefined
  for await (const line of createInterface({ input: started.stdout })) {
    ready = JSON.parse(line) as { ready?: boolean; pid?: number }
    break
  }
  clearTimeout(timer)
  if (ready?.ready !== true || ready.pid !== started.pid)
    throw new Error(`the daemon did not become ready: ${JSON.stringify(ready)}`)
  return performance.now() - startedAtMs
}

async function stop(): Promise<void> {
  const stopped = daemon
  if (stopped === undefined) return
  const ended = once(stopped, 'exit')
  stopped.kill('SIGTERM')
  await ended
  if (stopped.exitCode !== 0) throw new Error(`the daemon ended with ${stopped.exitCode ?? stopped.signalCode} after SIGTERM`)
}

/** Processor time of one `atoll status`: what it takes, however busy the machine is. It waits for next to nothing. */
function statusCpuMs(): number {
  const script = '"$0" status >/dev/null && times'
  const result = spawnSync('sh', ['-c', script, atoll], { encoding: 'utf8', env: { ...process.env, ATOLL_HOME: home } })
  // The second line is that of the children: user and system, as 0m0.05s.
  const times = [...(result.stdout.split('\n')[1] ?? '').matchAll(/(\d+)m([\d.]+)s/g)]
  if (result.status !== 0 || times.length !== 2) throw new Error(`atoll status failed: ${result.stdout}${result.stderr}`)
  return times.reduce((sum, [, minutes, seconds]) => sum + Number(minutes) * 60_000 + Number(seconds) * 1000, 0)
}

/** The best of a few tries. */
async function bestOf(tries: number, measureMs: () => number | Promise<number>): Promise<number> {
  let bestMs = Infinity
  for (let index = 0; index < tries; index += 1) bestMs = Math.min(bestMs, await measureMs())
  return Math.round(bestMs)
}

function against(valueMs: number, limitMs: number): string {
  return valueMs <= limitMs ? `${valueMs} ms` : `${valueMs} ms (OVER the ${limitMs} ms that the README promises)`
}

async function main(): Promise<void> {
  const version = cli('--version').trim()
  for (const group of readdirSync(join(root, 'cli/commands'))) {
    // Every module of the CLI is loaded, also those that no step below runs.
    if (!group.endsWith('.test.ts')) await import(join(root, 'cli/commands', group))
  }
  await start()
  const status = JSON.parse(cli('status', '--json')) as { version?: string }
  if (status.version !== version) throw new Error(`the daemon is ${status.version}, the CLI is ${version}`)
  const statusMs = await bestOf(10, statusCpuMs)
  await stop()
  const startMs = await bestOf(3, async () => {
    const readyMs = await start()
    await stop()
    return readyMs
  })
  // Printed, not asserted: how busy the machine is must not decide whether the tests pass.
  console.log(`status takes ${against(statusMs, statusMsMax)}, a second start is ready in ${against(startMs, secondStartMsMax)}`)
}

try {
  await main()
} finally {
  if (daemon?.exitCode === null) daemon.kill('SIGKILL')
  rmSync(home, { recursive: true, force: true })
}
