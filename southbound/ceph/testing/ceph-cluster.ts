/** A real one-node Ceph cluster for a test file. Where Ceph is not installed there is none, and its tests are skipped. */
import { execFile, spawnSync } from 'node:child_process'
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'

const execFileAsync = promisify(execFile)
const script = join(import.meta.dirname, 'cluster.sh')

/** Programs of the Debian packages ceph-mon, ceph-osd and ceph-mgr. */
const programs = ['ceph-mon', 'ceph-osd', 'ceph-mgr', 'ceph', 'rados']

/** Whether this machine can run one; where everything must run, the tests fail instead of being skipped. */
export function hasCeph(): boolean {
  if (process.env['ATOLL_TEST_REQUIRE'] === 'all') return true
  return programs.every((program) => spawnSync('sh', ['-c', 'command -v -- "$1"', 'sh', program]).status === 0)
}

/** Whether it can be put into a network namespace, so that the network to it can be cut; else as above. */
export function canCutNetwork(): boolean {
  if (process.env['ATOLL_TEST_REQUIRE'] === 'all') return true
  const name = `atoll-test-${process.pid}`
  const run = (command: string): boolean =>
    spawnSync('ip', ['netns', command, name], { env: { ...process.env, PATH: searchPath() } }).status === 0
  return run('add') && run('del')
}

function searchPath(): string {
  return `${process.env['PATH'] ?? ''}:/usr/sbin:/sbin`
}

export interface CephClusterOptions {
  /** Names of the RADOS pools; the first one is `atoll`, the default. */
  readonly pools?: readonly string[]
  /** It knows how full it is (takes some seconds more). */
  readonly manager?: boolean
  /** Default 1. */
  readonly osds?: number
  /** Copies of everything; default 1. */
  readonly copies?: number
  /** It has a network that can be cut. */
  readonly network?: boolean
  /** The folder that it lies in. */
  readonly parent?: string
}

export class CephCluster {
  /** All there is of it. */
  readonly folder: string
  readonly #environment: NodeJS.ProcessEnv

  private constructor(folder: string, environment: NodeJS.ProcessEnv) {
    this.folder = folder
    this.#environment = environment
  }

  static async start(options: CephClusterOptions = {}): Promise<CephCluster> {
    // Short, because of the sockets in it.
    const folder = await mkdtemp(join(options.parent ?? tmpdir(), 'ceph-'))
    const cluster = new CephCluster(folder, {
      ...process.env,
      PATH: searchPath(),
      OSDS: String(options.osds ?? 1),
      SIZE: String(options.copies ?? 1),
      NETNS: options.network === true ? '1' : '0',
      POOLS: (options.pools ?? ['atoll']).join(' '),
      MGR: options.manager === true ? '1' : '0',
      OWNER_PID: String(process.pid),
    })
    try {
      await cluster.resume()
    } catch (error) {
      await cluster.remove()
      throw error
    }
    return cluster
  }

  /** Options of a pool of Atoll in it; nothing but a hang runs into its times. */
  optionsIn(namespace: string): { conf: string; pool: string; namespace: string; timeout: string; 'connect-timeout': string } {
    return { conf: this.conf, pool: 'atoll', namespace, timeout: '600', 'connect-timeout': '300' }
  }

  get conf(): string {
    return join(this.folder, 'ceph.conf')
  }

  /** Starts what of it does not run. */
  async resume(): Promise<void> {
    await this.#run('start')
  }

  /** From now on nothing passes between the cluster and this machine, and nobody is told (`network`). */
  async cutNetwork(): Promise<void> {
    await this.#run('cut')
  }

  async mendNetwork(): Promise<void> {
    await this.#run('mend')
  }

  /** Ends its daemons; what it holds stays. */
  async stop(signal: 'TERM' | 'KILL' = 'TERM'): Promise<void> {
    await execFileAsync(script, ['stop', this.folder], { env: { ...this.#environment, STOP_SIGNAL: signal } })
  }

  /** Ends it for good. */
  async remove(): Promise<void> {
    await rm(join(this.folder, 'run', 'guard'), { force: true })
    await this.#run('remove')
    await rm(this.folder, { recursive: true, force: true, maxRetries: 5 })
  }

  async #run(command: 'start' | 'remove' | 'cut' | 'mend'): Promise<void> {
    await execFileAsync(script, [command, this.folder], { env: this.#environment })
  }

  /** Pid of a daemon: `mon.a`, `osd.0`. */
  async pidOf(daemon: string): Promise<number> {
    return Number(await readFile(join(this.folder, 'run', `${daemon}.pid`), 'utf8'))
  }

  /** Runs `ceph` with these arguments and returns what it prints. */
  async ceph(...args: string[]): Promise<string> {
    const { stdout } = await execFileAsync('ceph', ['-c', this.conf, ...args])
    return stdout
  }

  /** The same with `rados`. */
  async rados(...args: string[]): Promise<string> {
    const { stdout } = await execFileAsync('rados', ['-c', this.conf, ...args], { maxBuffer: 2 ** 26 })
    return stdout
  }

  /** A user with these capabilities (pairs: `mon`, `profile rbd`, …), and the path of its keyring. */
  async addUser(name: string, ...capabilities: string[]): Promise<string> {
    const keyring = join(this.folder, `client.${name}.keyring`)
    await this.ceph('auth', 'get-or-create', `client.${name}`, ...capabilities, '-o', keyring)
    return keyring
  }
}
