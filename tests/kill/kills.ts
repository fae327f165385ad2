/**
 * kill -9 of the real daemon under load: four connections at depth 16 write, flush and trim a clone while snapshots are
 * taken; an oracle outside of the daemon knows what was answered. After each kill the daemon is started again on the same
 * home, and every slot must have the version that was answered last or one that was sent since. At the end every snapshot is unchanged, and
 * after deleting everything nothing is left in the pool.
 */
import { createHash } from 'node:crypto'
import { open } from 'node:fs/promises'
import { join } from 'node:path'
import { connect, type NbdConnection } from '@atoll/nbd-client'
import { Random } from '../crash/random.ts'
import { TestHome } from '../test-home.ts'
import { checkWithin, SlotOracle, slotBytes } from './slot-oracle.ts'

export interface KillOptions {
  readonly home: string
  readonly seed: number
  readonly killCount: number
  /** A pool `other` that is made and used instead of `default`: its driver and options. */
  readonly pool?: { readonly driver: string; readonly options: Readonly<Record<string, string>> }
  /** With `pool`: in which of the two the image lies, and in which the volume that is made of it. */
  readonly across?: { readonly image: 'default' | 'other'; readonly volume: 'default' | 'other' }
  readonly onProgress?: (text: string) => void
}

export interface KillReport {
  kills: number
  writes: number
  flushes: number
  snapshots: number
  /** From the start of the process until it is ready, the slowest. */
  restartMsMax: number
}

const connectionCount = 4
const depth = 16
const slotCount = 4096
const volumeBytes = slotCount * slotBytes
const snapshotEvery = 5
const snapshotsKeptMax = 12

interface TakenSnapshot {
  readonly name: string
  readonly sha256: string
}

export async function runKills(options: KillOptions): Promise<KillReport> {
  const report: KillReport = { kills: 0, writes: 0, flushes: 0, snapshots: 0, restartMsMax: 0 }
  const random = new Random(options.seed)
  const oracle = new SlotOracle(slotCount)
  const snapshots: TakenSnapshot[] = []
  const home = TestHome.at(options.home)
  await home.start()
  try {
    const source = join(home.path, 'base.raw')
    const file = await open(source, 'wx')
    await file.truncate(volumeBytes)
    // What is read from the other pool is something.
    if (options.across !== undefined) await file.writeFile(oracle.fill())
    await file.close()
    const pool = options.pool === undefined ? 'default' : 'other'
    if (options.pool !== undefined) {
      const given = Object.entries(options.pool.options).flatMap(([key, value]) => ['--option', `${key}=${value}`])
      await home.jsonMeanwhile('pool', 'create', pool, '--driver', options.pool.driver, ...given)
    }
    const { across = { image: pool, volume: pool } } = options
    await home.jsonMeanwhile('image', 'import', 'base', source, '--format', 'raw', '--pool', across.image)
    await home.jsonMeanwhile('volume', 'create', 'victim', '--from', 'image:base', '--pool', across.volume)
    await home.jsonMeanwhile('volume', 'attach', 'victim')
    const { id } = await home.jsonMeanwhile<{ id: string }>('volume', 'show', 'victim')
    const target = { path: join(home.path, 'nbd.sock') }
    const connectOne = (exportName = id): Promise<NbdConnection> => connect(target, { exportName })

    for (let kill = 0; kill < options.killCount; kill++) {
      const load = new Load(
        await Promise.all(Array.from({ length: connectionCount }, () => connectOne())),
        oracle,
        random,
        report,
      )
      load.start()
      if (kill % snapshotEvery === snapshotEvery - 1) {
        snapshots.push(await takeSnapshot(home, kill, oracle, connectOne))
        report.snapshots++
      }
      await load.writesReach(load.writes + 200 + random.below(4000))
      await home.end('SIGKILL')
      report.kills++
      await load.ended()

      const startedAt = performance.now()
      await home.start()
      report.restartMsMax = Math.max(report.restartMsMax, performance.now() - startedAt)
      const reader = await connectOne()
      oracle.settle(await readAll(reader), `seed ${options.seed}, kill ${kill}`)
      await reader.disconnect()
      if (snapshots.length > snapshotsKeptMax) {
        const [oldest] = snapshots.splice(random.below(snapshots.length), 1)
        if (oldest !== undefined) {
          await checkSnapshot(home, oldest, connectOne)
          await home.jsonMeanwhile('snapshot', 'delete', `victim@${oldest.name}`)
        }
      }
      options.onProgress?.(`kill ${kill + 1} of ${options.killCount}: ${report.writes} writes, ${report.flushes} flushes`)
    }

    for (const snapshot of snapshots) await checkSnapshot(home, snapshot, connectOne)
    await checkNothingLeaks(home, options.pool === undefined ? ['default'] : ['default', 'other'])
    return report
  } finally {
    await home.end('SIGKILL')
  }
}

export async function readAll(connection: NbdConnection): Promise<Uint8Array> {
  const content = new Uint8Array(connection.sizeBytes)
  const step = 1 << 20
  for (let at = 0; at < content.length; at += step)
    content.set(await connection.read(at, Math.min(step, content.length - at)), at)
  return content
}

async function readSnapshot(
  home: TestHome,
  name: string,
  connectOne: (id: string) => Promise<NbdConnection>,
): Promise<Uint8Array> {
  const clone = `reader-of-${name}`
  const { id } = await home.jsonMeanwhile<{ id: string }>('volume', 'create', clone, '--from', `snapshot:victim@${name}`)
  await home.jsonMeanwhile('volume', 'attach', clone)
  const connection = await connectOne(id)
  const content = await readAll(connection)
  await connection.disconnect()
  await home.jsonMeanwhile('volume', 'detach', clone)
  await home.jsonMeanwhile('volume', 'delete', clone)
  return content
}

async function takeSnapshot(
  home: TestHome,
  kill: number,
  oracle: SlotOracle,
  connectOne: (id: string) => Promise<NbdConnection>,
): Promise<TakenSnapshot> {
  const name = `s${kill}`
  const before = oracle.bounds()
  await home.snapshotMeanwhile(`victim@${name}`)
  const after = oracle.bounds()
  const content = await readSnapshot(home, name, connectOne)
  checkWithin(content, before.acknowledged, after.issued, `snapshot ${name}`)
  return { name, sha256: sha256(content) }
}

async function checkSnapshot(
  home: TestHome,
  snapshot: TakenSnapshot,
  connectOne: (id: string) => Promise<NbdConnection>,
): Promise<void> {
  const found = sha256(await readSnapshot(home, snapshot.name, connectOne))
  if (found !== snapshot.sha256) throw new Error(`snapshot ${snapshot.name} changed: ${snapshot.sha256} was ${found}`)
}

export function sha256(content: Uint8Array): string {
  return createHash('sha256').update(content).digest('hex')
}

async function checkNothingLeaks(home: TestHome, poolNames: readonly string[]): Promise<void> {
  await home.jsonMeanwhile('volume', 'detach', 'victim')
  await home.jsonMeanwhile('volume', 'delete', 'victim', '--with-snapshots')
  await home.jsonMeanwhile('image', 'delete', 'base')
  for (const poolName of poolNames) await home.jsonMeanwhile('pool', 'reclaim', poolName)
  for (const poolName of poolNames) {
    const { storedBytes } = await home.jsonMeanwhile<{ storedBytes: number }>('pool', 'show', poolName)
    if (storedBytes !== 0)
      throw new Error(`after everything was deleted and reclaimed the pool ${poolName} still holds ${storedBytes} bytes`)
  }
}

/** Four connections at depth 16, each worker on slots of its own. Ends when the connections are lost, or it is stopped. */
export class Load {
  writes = 0
  readonly #connections: NbdConnection[]
  readonly #oracle: SlotOracle
  readonly #random: Random
  readonly #report: KillReport
  #workers: Promise<void>[] = []
  #wake: (() => void) | null = null
  #stopping = false

  constructor(connections: NbdConnection[], oracle: SlotOracle, random: Random, report: KillReport) {
    this.#connections = connections
    this.#oracle = oracle
    this.#random = random
    this.#report = report
  }

  start(): void {
    this.#workers = this.#connections.flatMap((connection, c) =>
      Array.from({ length: depth }, (_, d) => this.#work(connection, c * depth + d)),
    )
  }

  /** Waits until so many writes were answered, or the load ended by itself. */
  async writesReach(count: number): Promise<void> {
    const all = this.ended()
    while (this.writes < count) {
      const more = new Promise<boolean>((resolve) => {
        this.#wake = () => resolve(true)
      })
      if (!(await Promise.race([more, all.then(() => false)]))) throw new Error('the load ended before the daemon was killed')
    }
  }

  async ended(): Promise<void> {
    await Promise.all(this.#workers)
  }

  /** Ends the load with the daemon alive. */
  async stop(): Promise<void> {
    this.#stopping = true
    await this.ended()
    for (const connection of this.#connections) await connection.disconnect()
  }

  async #work(connection: NbdConnection, worker: number): Promise<void> {
    const workers = connectionCount * depth
    try {
      while (!this.#stopping) {
        const slot = worker + workers * this.#random.below(this.#oracle.slotCount / workers)
        const fua = this.#random.chance(3)
        const { version, data } = this.#oracle.issue(slot)
        await connection.write(slot * slotBytes, data, { fua })
        this.#oracle.acknowledge(slot, version)
        this.writes++
        this.#report.writes++
        this.#wake?.()
        if (!this.#random.chance(4)) continue
        await connection.flush()
        this.#report.flushes++
      }
    } catch (error) {
      const { code } = error as { code?: string }
      if (code !== 'NBD_CONNECTION_LOST' && code !== 'NBD_CLOSED') throw error
    }
  }
}
