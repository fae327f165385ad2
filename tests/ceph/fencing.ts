/**
 * Fencing rounds: two daemons share a catalog with a volume on Ceph. The active one is under load when it is stopped (SIGSTOP, not in
 * the middle of a change of the catalog), the other one takes the volume over, reads what is there and writes on; then the stopped
 * one is continued and its clients go on asking it.
 *
 * What must hold: what was flushed is there; nothing that the stopped one's clients ask for after the take-over is ever seen, or
 * answered with success; and the one that was taken over ends. Then the two change places.
 */
import { createRequire } from 'node:module'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { connect, type NbdConnection } from '@atoll/nbd-client'
import type Database from 'better-sqlite3'
import { Random } from '../crash/random.ts'
import { readAll } from '../kill/kills.ts'
import { checkWithin, encodeSlot, SlotOracle, slotBytes } from '../kill/slot-oracle.ts'
import { repositoryRoot, type TestHome } from '../test-home.ts'

const Sqlite = createRequire(join(repositoryRoot, 'core', 'package.json'))('better-sqlite3') as typeof Database

const connectionCount = 2
const depth = 8
const slotCount = 2048
const volumeBytes = slotCount * slotBytes
/** Versions that only clients of a daemon that was taken over write: the oracle never gives them. */
const zombieVersionFrom = 2 ** 31

export interface FencingOptions {
  /** Neither runs yet. */
  readonly homes: readonly [TestHome, TestHome]
  /** Absolute. */
  readonly catalog: string
  readonly seed: number
  readonly roundCount: number
  /** Options of the pool on Ceph. */
  readonly poolOptions: Readonly<Record<string, string>>
}

export interface FencingReport {
  rounds: number
  writes: number
  flushes: number
  /** Requests that were sent to a daemon, or under way there, after it was taken over, and how many it answered with success. */
  zombieRequests: number
  zombieAcknowledgements: number
  /** From the command until the volume can be used elsewhere, the longest. */
  takeOverMsMax: number
  /** From the continuation of the stopped one to its end, the longest. */
  endMsMax: number
}

export async function runFencing(options: FencingOptions): Promise<FencingReport> {
  const report: FencingReport = {
    rounds: 0,
    writes: 0,
    flushes: 0,
    zombieRequests: 0,
    zombieAcknowledgements: 0,
    takeOverMsMax: 0,
    endMsMax: 0,
  }
  const random = new Random(options.seed)
  const oracle = new SlotOracle(slotCount)
  let [owner, other] = options.homes
  let { pid } = await owner.start('--catalog', options.catalog)
  const given = Object.entries(options.poolOptions).flatMap(([key, value]) => ['--option', `${key}=${value}`])
  await owner.jsonMeanwhile('pool', 'create', 'fast', '--driver', 'ceph', ...given)
  await owner.jsonMeanwhile('volume', 'create', 'disk', '--size', String(volumeBytes), '--pool', 'fast')
  let { uri } = await owner.jsonMeanwhile<{ uri: string }>('volume', 'attach', 'disk')

  for (let round = 0; round < options.roundCount; round += 1) {
    const context = `seed ${options.seed}, round ${round}`
    const { pid: otherPid } = await other.start('--catalog', options.catalog)
    const connections = await Promise.all(Array.from({ length: connectionCount }, () => connect(uri)))
    const load = new Load(connections, oracle, random, report)
    await load.writesReach(200 + random.below(1500))
    const stoppedPid = pid
    await stopOutsideOfChange(stoppedPid, options.catalog)
    try {
      const startedAt = performance.now()
      const attached = await other.jsonMeanwhile<{ uri: string }>('volume', 'attach', 'disk', '--take-over')
      report.takeOverMsMax = Math.max(report.takeOverMsMax, performance.now() - startedAt)
      load.takenOver()
      const reader = await connect(attached.uri)
      const upper = oracle.bounds().issued
      const found = await readAll(reader)
      checkWithin(found, load.flushed, upper, context)
      oracle.settleFrom(load.flushed, found, context)
      for (let count = 0; count < 200; count += 1) {
        const slot = random.below(slotCount)
        const { version, data } = oracle.issue(slot)
        await reader.write(slot * slotBytes, data)
        oracle.acknowledge(slot, version)
      }
      await reader.flush()
      const continuedAt = performance.now()
      process.kill(pid, 'SIGCONT')
      const exitCode = await owner.ended()
      report.endMsMax = Math.max(report.endMsMax, performance.now() - continuedAt)
      if (exitCode !== 1) throw new Error(`${context}: the daemon that was taken over ended with ${exitCode}`)
      if (!(await owner.log()).includes('CATALOG_TAKEN_OVER')) throw new Error(`${context}: it does not say why it ended`)
      await load.ended()
      // Nothing but what the oracle was told, in every slot.
      const { acknowledged } = oracle.bounds()
      checkWithin(await readAll(reader), acknowledged, acknowledged, `${context}, after the old owner went on`)
      await reader.disconnect()
      report.rounds += 1
      ;({ uri } = attached)
      pid = otherPid
      ;[owner, other] = [other, owner]
    } finally {
      goOn(stoppedPid)
    }
  }
  return report
}

/** Continues a process that may have ended. */
export function goOn(pid: number): void {
  try {
    process.kill(pid, 'SIGCONT')
  } catch {
    // It is gone.
  }
}

/** Stops a process that has no transaction of the catalog open that writes: one that has keeps everybody else waiting. */
export async function stopOutsideOfChange(pid: number, catalog: string): Promise<void> {
  for (;;) {
    process.kill(pid, 'SIGSTOP')
    if (isFree(catalog)) return
    process.kill(pid, 'SIGCONT')
    await delay(3)
  }
}

function isFree(catalog: string): boolean {
  const database = new Sqlite(catalog, { timeout: 0 })
  try {
    database.exec('begin immediate')
    database.exec('rollback')
    return true
  } catch (error) {
    if (String((error as { code?: unknown }).code).startsWith('SQLITE_BUSY')) return false
    throw error
  } finally {
    database.close()
  }
}

/** Writers, each on slots of its own, who also read and flush; they go on after the take-over, until their connection is lost. */
class Load {
  /** Versions that a flush has answered for. */
  flushed: Uint32Array
  readonly #oracle: SlotOracle
  readonly #random: Random
  readonly #report: FencingReport
  readonly #connections: readonly NbdConnection[]
  readonly #workers: Promise<void>[] = []
  #writes = 0
  #isTakenOver = false
  #zombieVersion = zombieVersionFrom
  #wake: () => void = () => undefined

  constructor(connections: NbdConnection[], oracle: SlotOracle, random: Random, report: FencingReport) {
    this.#oracle = oracle
    this.#random = random
    this.#report = report
    // What an earlier owner was asked to flush, or what its successor showed.
    this.flushed = oracle.bounds().acknowledged
    this.#connections = connections
    this.#startWorkers()
  }

  #startWorkers(): void {
    for (const [c, connection] of this.#connections.entries())
      for (let d = 0; d < depth; d += 1) this.#workers.push(this.#work(connection, c * depth + d))
  }

  async writesReach(count: number): Promise<void> {
    const all = this.ended().then(() => true)
    while (this.#writes < count) {
      const more = new Promise<boolean>((resolve) => {
        this.#wake = () => resolve(false)
      })
      if (await Promise.race([more, all])) throw new Error('the load ended before the owner was stopped')
    }
  }

  /** From now on nothing is to be answered with success: not what is under way, and not what as many more ask for at once. */
  takenOver(): void {
    this.#isTakenOver = true
    this.#report.zombieRequests += connectionCount * depth
    this.#startWorkers()
  }

  async ended(): Promise<void> {
    await Promise.all(this.#workers)
  }

  async #work(connection: NbdConnection, worker: number): Promise<void> {
    const workers = connectionCount * depth
    for (;;) {
      const slot = worker + workers * this.#random.below(slotCount / workers)
      try {
        if (this.#random.chance(5)) {
          await connection.read(slot * slotBytes, slotBytes)
          this.#count()
        }
        if (this.#isTakenOver) {
          this.#report.zombieRequests += 1
          await connection.write(slot * slotBytes, encodeSlot(slot, this.#zombieVersion++))
          this.#count()
          continue
        }
        const { version, data } = this.#oracle.issue(slot)
        await connection.write(slot * slotBytes, data)
        if (this.#count()) continue
        this.#oracle.acknowledge(slot, version)
        this.#writes += 1
        this.#report.writes += 1
        this.#wake()
        if (!this.#random.chance(6)) continue
        const { acknowledged } = this.#oracle.bounds()
        await connection.flush()
        if (this.#count()) continue
        this.flushed = this.flushed.map((before, index) => Math.max(before, acknowledged[index] ?? 0))
        this.#report.flushes += 1
      } catch (error) {
        const { code } = error as { code?: string }
        if (code === 'NBD_CONNECTION_LOST' || code === 'NBD_CLOSED') return
        // Answered as failed: the client goes on asking.
        if (!this.#isTakenOver) throw error
      }
    }
  }

  /** Something was answered with success. Returns whether it must not have been. */
  #count(): boolean {
    if (this.#isTakenOver) this.#report.zombieAcknowledgements += 1
    return this.#isTakenOver
  }
}
