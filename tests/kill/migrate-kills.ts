/**
 * kill -9 of the real daemon while a volume, its snapshots and two clones of them move from pool to pool and back, all three at once,
 * and four connections at depth 16 write the volume. After each kill the daemon is started again on the same home: everything that was
 * answered is there, snapshots and clones are what they were, and the moves go on by themselves. When they have ended, the pool
 * that was left holds nothing, and `check` finds nothing.
 */
import { open } from 'node:fs/promises'
import { join } from 'node:path'
import { connect, type NbdConnection } from '@atoll/nbd-client'
import { Random } from '../crash/random.ts'
import { TestHome } from '../test-home.ts'
import { Load, readAll, sha256, type KillReport } from './kills.ts'
import { checkWithin, SlotOracle, slotBytes } from './slot-oracle.ts'

export interface MigrateKillOptions {
  readonly home: string
  readonly seed: number
  readonly killCount: number
  /** The pool `other`, to which everything moves from `default`, and back: its driver and options. */
  readonly other: { readonly driver: string; readonly options: Readonly<Record<string, string>> }
  readonly onProgress?: (text: string) => void
}

export interface MigrateKillReport extends KillReport {
  /** Times that everything was moved to the other pool. */
  moves: number
  /** How many jobs were killed in which phase. */
  killedIn: Record<string, number>
  /** Longest that a swap held clients up, as the jobs that ended say. */
  pauseMsMax: number
}

const connectionCount = 4
const slotCount = 2048
const snapshotCount = 5
/** Then the moves are let run to their end. */
const killsPerMoveMax = 5
/** Among these is chosen for each move, so that kills hit the copying, or what comes after it. */
const limits = ['4M', '16M', '64M', 'none']

interface Job {
  readonly id: string
  readonly kind: string
  readonly state: string
  readonly subject: string
  readonly error: { readonly code: string; readonly message: string } | null
  readonly details: { readonly phase: string; readonly pauseMs: number } | null
}

/** A snapshot or a clone, which nobody writes while it is looked at. */
interface Still {
  /** As `volume attach` takes it. */
  readonly name: string
  readonly id: string
  readonly sha256: string
}

export async function runMigrateKills(options: MigrateKillOptions): Promise<MigrateKillReport> {
  const run = new MigrateKills(options)
  try {
    await run.prepare()
    await run.killAll()
    await run.end()
    return run.report
  } finally {
    await run.home.end('SIGKILL')
  }
}

class MigrateKills {
  readonly home: TestHome
  readonly report: MigrateKillReport
  readonly #options: MigrateKillOptions
  readonly #random: Random
  readonly #oracle = new SlotOracle(slotCount)
  readonly #snapshots: Still[] = []
  readonly #clones: Still[] = []
  #snapshotsTaken = 0
  #victimId = ''
  #source = 'default'
  #target = 'other'

  constructor(options: MigrateKillOptions) {
    this.#options = options
    this.#random = new Random(options.seed)
    this.home = TestHome.at(options.home)
    const none = { kills: 0, writes: 0, flushes: 0, snapshots: 0, restartMsMax: 0 }
    this.report = { ...none, moves: 0, killedIn: {}, pauseMsMax: 0 }
  }

  /** A volume that was made of an image, with snapshots between which it was written, and clones that were written, too. */
  async prepare(): Promise<void> {
    const { home } = this
    await home.start()
    const { driver, options } = this.#options.other
    const given = Object.entries(options).flatMap(([key, value]) => ['--option', `${key}=${value}`])
    await home.jsonMeanwhile('pool', 'create', 'other', '--driver', driver, ...given)
    // How full the disk of this machine is does not matter.
    await home.jsonMeanwhile('pool', 'set', 'default', 'low-space=off')
    const source = join(home.path, 'base.raw')
    const file = await open(source, 'wx')
    await file.writeFile(this.#oracle.fill())
    await file.close()
    await home.jsonMeanwhile('image', 'import', 'base', source, '--format', 'raw')
    await home.jsonMeanwhile('volume', 'create', 'victim', '--from', 'image:base')
    await home.jsonMeanwhile('image', 'delete', 'base')
    await home.jsonMeanwhile('volume', 'attach', 'victim')
    this.#victimId = (await home.jsonMeanwhile<{ id: string }>('volume', 'show', 'victim')).id

    const load = await this.#startLoad()
    for (let count = 0; count < snapshotCount; count += 1) {
      await load.writesReach(load.writes + 1000)
      this.#snapshots.push(await this.#takeSnapshot())
    }
    for (const [index, snapshot] of [this.#snapshots[1], this.#snapshots[3]].entries()) {
      const name = `clone-${index}`
      const made = await home.jsonMeanwhile<{ id: string }>(
        'volume',
        'create',
        name,
        '--from',
        `snapshot:${snapshot?.name ?? ''}`,
      )
      await home.jsonMeanwhile('volume', 'attach', name)
      const client = await this.#connect(made.id)
      for (let slot = index; slot < slotCount; slot += 64)
        await client.write(slot * slotBytes, Buffer.alloc(slotBytes, 0xc0 + index))
      await client.flush()
      this.#clones.push({ name, id: made.id, sha256: sha256(await readAll(client)) })
      await client.disconnect()
    }
    await load.stop()
  }

  async killAll(): Promise<void> {
    const { report } = this
    let killsOfMove = 0
    while (report.kills < this.#options.killCount) {
      const load = await this.#startLoad()
      // Some kills hit the requests for the moves themselves.
      const asked = this.#ask()
      if (this.#random.chance(50)) await asked
      if (this.#random.chance(33)) await this.#exchangeSnapshot()
      await load.writesReach(load.writes + 200 + this.#random.below(12_000))
      const runsToEnd = killsOfMove >= killsPerMoveMax
      if (runsToEnd) await asked.then(() => this.#jobsEnded())
      await this.home.end('SIGKILL')
      report.kills += 1
      killsOfMove += 1
      await Promise.all([load.ended(), asked])

      const startedAt = performance.now()
      await this.home.start()
      report.restartMsMax = Math.max(report.restartMsMax, performance.now() - startedAt)
      for (const { details } of await this.#jobs('queued', 'running')) {
        const phase = details?.phase ?? 'none'
        report.killedIn[phase] = (report.killedIn[phase] ?? 0) + 1
      }
      await this.#look(`seed ${this.#options.seed}, kill ${report.kills}`)
      if (await this.#hasMoved()) {
        await this.#turnRound()
        killsOfMove = 0
      }
      this.#options.onProgress?.(`kill ${report.kills} of ${this.#options.killCount}: ${JSON.stringify(report)}`)
    }
  }

  /** The last moves end, then everything is deleted, and nothing may be left. */
  async end(): Promise<void> {
    const { home } = this
    await this.#ask()
    await this.#jobsEnded()
    await this.#look('at the end')
    if (!(await this.#hasMoved())) throw new Error('every job has ended, but not everything was moved')
    await this.#turnRound()
    for (const { name } of [...this.#snapshots, ...this.#clones]) await home.jsonMeanwhile('volume', 'detach', name)
    await home.jsonMeanwhile('volume', 'detach', 'victim')
    await home.jsonMeanwhile('volume', 'delete', 'victim', '--with-snapshots')
    for (const { name } of this.#clones) await home.jsonMeanwhile('volume', 'delete', name)
    for (const pool of ['default', 'other']) await this.#requireEmpty(pool)
  }

  /** Asks for the moves that are not there yet; those that a kill cut off are asked for again the next time. */
  async #ask(): Promise<void> {
    const moving = new Set((await this.#jobs('queued', 'running').catch(() => [])).map(({ subject }) => subject))
    const volumes = [{ name: 'victim', id: this.#victimId }, ...this.#clones]
    await Promise.all(
      volumes.map(async ({ name, id }) => {
        if (moving.has(id)) return
        const limit = this.#random.pick(limits)
        const limited = limit === 'none' ? [] : ['--limit', limit]
        try {
          await this.home.jsonMeanwhile('migrate', name, '--to', this.#target, ...limited)
        } catch (error) {
          // Moved already, asked for by a request whose answer was cut off, or the daemon is dead.
          if (!/MOVE_NEEDLESS|MOVE_RUNNING|DAEMON_NOT_RUNNING/.test(String(error))) throw error
        }
      }),
    )
  }

  async #jobs(...states: string[]): Promise<Job[]> {
    const jobs = await this.home.jsonMeanwhile<Job[]>('job', 'list')
    const moves = jobs.filter(({ kind }) => kind === 'migrate')
    const failed = moves.find(({ state }) => state === 'failed')
    if (failed !== undefined) throw new Error(`job ${failed.id} failed: ${failed.error?.code}: ${failed.error?.message}`)
    for (const { details } of moves) this.report.pauseMsMax = Math.max(this.report.pauseMsMax, details?.pauseMs ?? 0)
    return moves.filter(({ state }) => states.includes(state))
  }

  async #jobsEnded(): Promise<void> {
    for (const { id } of await this.#jobs('queued', 'running'))
      await this.home.jsonMeanwhile('job', 'limit', id, 'none').catch(() => null)
    while ((await this.#jobs('queued', 'running')).length > 0);
  }

  async #hasMoved(): Promise<boolean> {
    if ((await this.#jobs('queued', 'running')).length > 0) return false
    for (const name of ['victim', ...this.#clones.map((clone) => clone.name)]) {
      const { pool, readsFrom } = await this.home.jsonMeanwhile<{ pool: string; readsFrom: string[] }>('volume', 'show', name)
      if (pool !== this.#target) return false
      if (readsFrom.length > 0) throw new Error(`${name} has moved to ${pool}, but reads from ${readsFrom.join(', ')}`)
    }
    return true
  }

  /** Everything has moved: nothing is left where it was, and it goes back. */
  async #turnRound(): Promise<void> {
    this.report.moves += 1
    await this.#requireEmpty(this.#source)
    const { findings } = await this.home.jsonMeanwhile<{ findings: unknown[] }>('check')
    if (findings.length > 0) throw new Error(`check finds ${JSON.stringify(findings)}`)
    ;[this.#source, this.#target] = [this.#target, this.#source]
  }

  async #requireEmpty(pool: string): Promise<void> {
    await this.home.jsonMeanwhile('pool', 'reclaim', pool)
    const { storedBytes } = await this.home.jsonMeanwhile<{ storedBytes: number }>('pool', 'show', pool)
    if (storedBytes !== 0) throw new Error(`everything was moved out of pool ${pool}, but it still holds ${storedBytes} bytes`)
  }

  async #connect(id: string): Promise<NbdConnection> {
    return await connect({ path: join(this.home.path, 'nbd.sock') }, { exportName: id })
  }

  async #startLoad(): Promise<Load> {
    const connections = await Promise.all(Array.from({ length: connectionCount }, () => this.#connect(this.#victimId)))
    const load = new Load(connections, this.#oracle, this.#random, this.report)
    load.start()
    return load
  }

  /** Attached for good, so that it is open while its layers move. */
  async #takeSnapshot(): Promise<Still> {
    const name = `victim@s${(this.#snapshotsTaken += 1)}`
    const before = this.#oracle.bounds()
    await this.home.snapshotMeanwhile(name)
    const after = this.#oracle.bounds()
    const { exportName: id } = await this.home.jsonMeanwhile<{ exportName: string }>('volume', 'attach', name)
    const content = await this.#read(id)
    checkWithin(content, before.acknowledged, after.issued, `snapshot ${name}`)
    this.report.snapshots += 1
    return { name, id, sha256: sha256(content) }
  }

  /** A new snapshot in the middle of the move; the oldest one goes. A kill may come between. */
  async #exchangeSnapshot(): Promise<void> {
    const taken = await this.#takeSnapshot()
    const [oldest] = this.#snapshots.splice(0, 1, taken)
    if (oldest === undefined) return
    await this.home.jsonMeanwhile('volume', 'detach', oldest.name)
    await this.home.jsonMeanwhile('snapshot', 'delete', oldest.name)
  }

  async #look(context: string): Promise<void> {
    this.#oracle.settle(await this.#read(this.#victimId), context)
    for (const still of [...this.#snapshots, ...this.#clones]) {
      const found = sha256(await this.#read(still.id))
      if (found !== still.sha256) throw new Error(`${context}: ${still.name} changed: ${still.sha256} was ${found}`)
    }
  }

  async #read(id: string): Promise<Uint8Array> {
    const connection = await this.#connect(id)
    const content = await readAll(connection)
    await connection.disconnect()
    return content
  }
}
