/** The servers that are compared: each serves one disk on a unix socket, and ends with the run. */
import { execFileSync, spawn, spawnSync, type ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { openSync, readFileSync, rmSync } from 'node:fs'
import { createConnection } from 'node:net'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import type { Readable } from 'node:stream'
import { setTimeout as wait } from 'node:timers/promises'

const repositoryRoot = join(import.meta.dirname, '..')
const startTimeoutMs = 30_000

/** Something that listens and is ended by its pid. */
export class Server {
  readonly #process: ChildProcess

  constructor(process: ChildProcess) {
    this.#process = process
  }

  get pid(): number {
    return this.#process.pid ?? 0
  }

  async stop(): Promise<void> {
    if (this.#process.exitCode !== null || this.#process.signalCode !== null) return
    const ended = once(this.#process, 'exit')
    this.#process.kill('SIGTERM')
    const timer = setTimeout(() => this.#process.kill('SIGKILL'), startTimeoutMs)
    await ended
    clearTimeout(timer)
  }
}

/** Why a peer cannot be compared; null if it is installed. */
export function missing(program: string, debianPackage: string): string | null {
  const found = spawnSync('sh', ['-c', 'command -v "$0"', program]).status === 0
  return found ? null : `${program} is not installed (Debian: apt-get install ${debianPackage})`
}

/** qemu-nbd over an image file. `shared` connections may come at a time. */
export async function startQemuNbd(path: string, format: 'raw' | 'qcow2', socket: string): Promise<Server> {
  // Discard and zeroes as a hypervisor has them; the cache as in our default: the page cache, and flush is a sync.
  const args = ['-f', format, '--cache=writeback', '--aio=threads', '--discard=unmap', '-t', '-e', '8', '-k', socket, path]
  return await listening(spawn('qemu-nbd', args, { stdio: ['ignore', 'ignore', 'inherit'] }), socket)
}

/** qemu-nbd over an RBD image; null where QEMU's driver for it (Debian: qemu-block-extra) is not installed. */
export async function startQemuNbdOverRbd(image: string, conf: string, socket: string): Promise<Server | null> {
  if (!spawnSync('qemu-img', ['--help'], { encoding: 'utf8' }).stdout.match(/^Supported formats:.*\brbd\b/m)) return null
  // No cache above the image: what qemu's `cache=none` means for one.
  const options = `driver=rbd,pool=rbd,image=${image},conf=${conf},user=admin`
  const args = ['--image-opts', options, '--cache=none', '-t', '-e', '8', '-k', socket]
  return await listening(spawn('qemu-nbd', args, { stdio: ['ignore', 'ignore', 'inherit'] }), socket)
}

/** nbdkit's file plugin. */
export async function startNbdkit(path: string, socket: string): Promise<Server> {
  const args = ['-f', '--exit-with-parent', '-U', socket, 'file', path]
  return await listening(spawn('nbdkit', args, { stdio: ['ignore', 'ignore', 'inherit'] }), socket)
}

/** Whether somebody listens on a unix socket. */
async function accepts(socket: string): Promise<boolean> {
  const connection = createConnection(socket)
  try {
    await once(connection, 'connect')
    return true
  } catch {
    return false
  } finally {
    connection.destroy()
  }
}

async function listening(process: ChildProcess, socket: string): Promise<Server> {
  const deadline = performance.now() + startTimeoutMs
  // The file is there before anybody listens.
  while (!(await accepts(socket))) {
    if (process.exitCode !== null || performance.now() > deadline) {
      process.kill('SIGKILL')
      throw new Error(`${process.spawnargs.join(' ')} does not listen on ${socket}`)
    }
    await wait(10)
  }
  return new Server(process)
}

/** Our daemon, used through its command line like everything a user does. */
export class Atoll {
  readonly #home: string
  readonly #server: Server

  private constructor(home: string, server: Server) {
    this.#home = home
    this.#server = server
  }

  static async start(home: string): Promise<Atoll> {
    const logPath = join(home, 'log')
    const daemon = spawn(join(repositoryRoot, 'atoll'), ['serve', '--json', '--http', 'off', '--home', home], {
      stdio: ['ignore', 'pipe', openSync(logPath, 'w')],
    })
    const timer = setTimeout(() => daemon.kill('SIGKILL'), startTimeoutMs)
    let isReady = false
    for await (const line of createInterface({ input: daemon.stdout as Readable })) {
      isReady = (JSON.parse(line) as { ready?: boolean }).ready === true
      break
    }
    clearTimeout(timer)
    if (!isReady) throw new Error(`the daemon on ${home} did not become ready: ${readFileSync(logPath, 'utf8').slice(-2000)}`)
    return new Atoll(home, new Server(daemon))
  }

  cli(...args: string[]): string {
    const env = { ...process.env, ATOLL_HOME: this.#home }
    return execFileSync(join(repositoryRoot, 'atoll'), args, { env, encoding: 'utf8', maxBuffer: 64 * 2 ** 20 }).trim()
  }

  json<T>(...args: string[]): T {
    return JSON.parse(this.cli(...args, '--json')) as T
  }

  /** Attaches a volume; returns its URI. */
  attach(volume: string): string {
    return this.cli('volume', 'attach', volume, '--format', 'uri')
  }

  /** Resident memory of the daemon. */
  residentBytes(): number {
    return Number(execFileSync('ps', ['-o', 'rss=', '-p', String(this.#server.pid)], { encoding: 'utf8' })) * 1024
  }

  async stop(): Promise<void> {
    await this.#server.stop()
    rmSync(this.#home, { recursive: true, force: true })
  }
}

export function socketUri(socket: string): string {
  return `nbd+unix:///?socket=${socket}`
}
