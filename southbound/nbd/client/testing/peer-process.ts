import { spawn } from 'node:child_process'
import type { ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { rm } from 'node:fs/promises'
import { connectRaw } from '../raw-connection.ts'

const startTimeoutMs = 300_000

/** An NBD server of somebody else, running. */
export interface PeerProcess {
  readonly socketPath: string
  /** Ends it at once, as a crash does; the socket file stays behind. */
  kill(): Promise<void>
  /** Ends it and removes the socket file. Idempotent. */
  stop(): Promise<void>
}

/** `nbdkit` in the foreground on a unix socket; `parameters` are the plugin and its own. */
export function startNbdkit(socketPath: string, parameters: readonly string[]): Promise<PeerProcess> {
  return startPeer('nbdkit', ['--foreground', '--exit-with-parent', '--unix', socketPath, ...parameters], socketPath)
}

/** `qemu-nbd` for an image of the given format on a unix socket. */
export function startQemuNbd(socketPath: string, imagePath: string, parameters: readonly string[] = []): Promise<PeerProcess> {
  return startPeer(
    'qemu-nbd',
    ['--format', 'raw', '--persistent', '--shared', '16', '--socket', socketPath, ...parameters, imagePath],
    socketPath,
  )
}

async function startPeer(command: string, parameters: readonly string[], socketPath: string): Promise<PeerProcess> {
  await rm(socketPath, { force: true })
  const child = spawn(command, parameters, { stdio: ['ignore', 'ignore', 'pipe'] })
  let complaint = ''
  child.stderr.on('data', (chunk: Buffer) => {
    complaint = (complaint + chunk.toString()).slice(-4096)
  })
  const exited = once(child, 'exit')
  exited.catch(() => {})
  const deadline = performance.now() + startTimeoutMs
  for (;;) {
    if (child.exitCode !== null || child.signalCode !== null) throw new Error(`${command} ended at once: ${complaint}`)
    if (await answers(socketPath)) break
    if (performance.now() > deadline) {
      child.kill('SIGKILL')
      throw new Error(`${command} did not answer within ${startTimeoutMs} ms: ${complaint}`)
    }
    await new Promise((resolve) => setTimeout(resolve, 10))
  }
  const kill = async (): Promise<void> => endProcess(child, exited)
  return {
    socketPath,
    kill,
    stop: async () => {
      await kill()
      await rm(socketPath, { force: true })
    },
  }
}

async function endProcess(child: ChildProcess, exited: Promise<unknown>): Promise<void> {
  if (child.exitCode === null && child.signalCode === null) child.kill('SIGKILL')
  await exited
}

async function answers(socketPath: string): Promise<boolean> {
  try {
    await using raw = await connectRaw({ path: socketPath })
    await raw.receive(16)
    return true
  } catch {
    return false
  }
}
