/**
 * What is going on: rates and latencies of every attached volume and of every pool's backend, and how quickly jobs move bytes, as
 * the difference of two looks at counters. Nothing is kept between two questions but, for the slow-backend flag, the last look.
 *
 * Rule: a backend is slow when its reads or syncs of an interval took longer than the limits below on average, or when some
 * were under way at both ends of the interval and none was done in between.
 */
import {
  latenciesSince,
  latencyCount,
  meanSeconds,
  quantileSeconds,
  type Catalog,
  type Clock,
  type Latencies,
  type Logger,
} from '@atoll/core'
import { noTotals, totalsOf, type DeviceTotals, type Mapper } from '@atoll/mapper'
import { latencyBucketEndsSeconds, type Device } from '@atoll/native'
import type { Exports } from './exports.ts'
import type { JobView } from './job-kind.ts'
import type { Jobs } from './jobs.ts'
import { delay, type SetTimer } from './timers.ts'

/** Reads of a backend take less on average, or it is slow. */
export const slowReadMs = 250
/** The same for syncs. */
export const slowSyncMs = 1000
/** How often backends are looked at by themselves. */
export const activityIntervalMs = 10_000
/** Shortest and longest interval that can be asked for. */
export const activityIntervalMsMin = 100
export const activityIntervalMsMax = 60_000

/** Operations of one kind in an interval. */
export interface OperationActivity {
  perSecond: number
  /** null: there were none. */
  meanMs: number | null
  /** To a fifth; null: there were none. */
  p99Ms: number | null
}

export interface VolumeActivity {
  /** Of the volume, snapshot or image. */
  id: string
  name: string
  /** Name of its home pool. */
  pool: string
  connections: number
  reads: OperationActivity
  writes: OperationActivity
  /** Discards and zeroes. */
  discards: OperationActivity
  flushes: OperationActivity
  readBytesPerSecond: number
  writeBytesPerSecond: number
  /** Requests of clients that were waiting or worked on at a time, on average. */
  queueDepth: number
  /** Requests that waited for the throttle. */
  throttledPerSecond: number
}

export interface PoolActivity {
  id: string
  name: string
  /** Reads that had to wait for the backend, and syncs; under way now. */
  reads: OperationActivity & { running: number }
  syncs: OperationActivity & { running: number }
  slow: boolean
}

/** A job that moved bytes at the end of the interval. */
export interface JobActivity {
  id: string
  kind: string
  /** Id of what it works on. */
  subject: string
  /** Of that; null: it is no volume, snapshot or image that is there. */
  name: string | null
  progressBytes: number
  /** null: not known. */
  totalBytes: number | null
  bytesPerSecond: number
  /** null: not known. */
  secondsLeft: number | null
}

export interface Activity {
  intervalMs: number
  /** By name. */
  volumes: VolumeActivity[]
  /** By name. */
  pools: PoolActivity[]
  /** In the order they were started. */
  jobs: JobActivity[]
}

/** What an attached volume has done since it was opened. */
export interface VolumeTotals {
  /** Of the volume, snapshot or image. */
  id: string
  name: string
  projectId: string
  /** Name of its home pool. */
  pool: string
  sizeBytes: number
  connections: number
  /** Journal since the last checkpoint. */
  journalBytes: number
  totals: DeviceTotals
}

interface VolumeLook {
  readonly name: string
  readonly poolId: string
  connections: number
  readonly device: Device
  readonly totals: DeviceTotals
}

interface Look {
  readonly atMs: number
  /** By id of the resource. */
  readonly volumes: ReadonlyMap<string, VolumeLook>
  /** By id of the pool. */
  readonly pools: ReadonlyMap<string, DeviceTotals>
  readonly jobs: readonly JobView[]
}

export interface ActivityOptions {
  readonly catalog: Catalog
  readonly mapper: Mapper
  readonly exports: Exports
  readonly jobs: Jobs
  readonly log: Logger
  readonly clock: Clock
  readonly setTimer: SetTimer
}

export class ActivityMonitor {
  readonly #options: ActivityOptions
  readonly #bucketEnds = latencyBucketEndsSeconds()
  /** Ids of the pools that were slow in the last interval. */
  readonly #slow = new Set<string>()
  #lastPools: ReadonlyMap<string, DeviceTotals> = new Map()
  #cancelTimer: (() => void) | null = null

  constructor(options: ActivityOptions) {
    this.#options = options
  }

  /** Looks at the backends from time to time until it is closed. */
  start(): void {
    this.#cancelTimer = this.#options.setTimer(() => {
      this.start()
      void this.#lookForSlow()
    }, activityIntervalMs)
  }

  close(): void {
    this.#cancelTimer?.()
  }

  /** Whether the backend of the pool was slow when it was looked at last. */
  isSlow(poolId: string): boolean {
    return this.#slow.has(poolId)
  }

  /** Every attached volume, snapshot and image whose device is open, by name. */
  async volumeTotals(): Promise<VolumeTotals[]> {
    const { catalog, mapper } = this.#options
    const rows = await catalog.db
      .selectFrom('attachments')
      .innerJoin('resources', 'resources.id', 'attachments.volume_id')
      .innerJoin('pools', 'pools.id', 'resources.home_pool_id')
      .select(['resources.id', 'resources.project_id', 'pools.name as pool_name'])
      .execute()
    const byId = new Map(rows.map((row) => [row.id, row]))
    const volumes = [...this.#volumes()].flatMap(([id, { name, connections, device, totals }]) => {
      const row = byId.get(id)
      if (row === undefined || mapper.opened(id)?.device !== device) return []
      const { journalBytes } = device.stats()
      const sizeBytes = device.sizeBytes()
      return [{ id, name, projectId: row.project_id, pool: row.pool_name, sizeBytes, connections, journalBytes, totals }]
    })
    return volumes.toSorted(byName)
  }

  /** What happens from now on for `intervalMs`; less if `signal` is aborted. */
  async over(intervalMs: number, signal?: AbortSignal): Promise<Activity> {
    const before = this.#look()
    await delay(this.#options.setTimer, intervalMs, signal)
    const after = this.#look()
    const rows = await this.#options.mapper.pools.list()
    const poolNames = new Map(rows.map(({ id, name }) => [id, name]))
    const seconds = Math.max(after.atMs - before.atMs, 1) / 1000
    const volumes = [...after.volumes].map(([id, volume]) => {
      const known = before.volumes.get(id)
      // A device that was opened meanwhile has counted nothing before.
      const totals = known === undefined || known.device !== volume.device ? noTotals : known.totals
      return this.#volumeActivity({ id, volume, before: totals, pool: poolNames.get(volume.poolId) ?? volume.poolId, seconds })
    })
    const pools = rows.map(({ id, name }) => {
      const [earlier, later] = [before.pools.get(id) ?? noTotals, after.pools.get(id) ?? noTotals]
      return {
        id,
        name,
        reads: { ...this.#operations(earlier.backendRead, later.backendRead, seconds), running: later.backendReadsRunning },
        syncs: { ...this.#operations(earlier.backendSync, later.backendSync, seconds), running: later.backendSyncsRunning },
        slow: isSlowBackend(earlier, later),
      }
    })
    const jobs = await this.#jobs(before.jobs, after.jobs, seconds)
    return { intervalMs: after.atMs - before.atMs, volumes: volumes.toSorted(byName), pools, jobs }
  }

  #look(): Look {
    const { clock, jobs, mapper } = this.#options
    return { atMs: clock.monotonicMs(), volumes: this.#volumes(), pools: mapper.pools.totals(), jobs: jobs.moving() }
  }

  async #jobs(before: readonly JobView[], after: readonly JobView[], seconds: number): Promise<JobActivity[]> {
    if (after.length === 0) return []
    const { catalog } = this.#options
    const subjects = after.map(({ subject }) => subject)
    const resources = await catalog.db.selectFrom('resources').select(['id', 'name']).where('id', 'in', subjects).execute()
    const pools = await catalog.db.selectFrom('pools').select(['id', 'name']).where('id', 'in', subjects).execute()
    const names = new Map([...resources, ...pools].map(({ id, name }) => [id, name]))
    return after.map(({ id, kind, subject, progressBytes, totalBytes, rateBytesPerSecond }) => {
      const known = before.find((job) => job.id === id)
      // One that was begun meanwhile may have gone on where it was long ago; one that began anew has gone back.
      const bytesPerSecond = known === undefined ? rateBytesPerSecond : Math.max(0, progressBytes - known.progressBytes) / seconds
      const leftBytes = totalBytes === null ? null : Math.max(0, totalBytes - progressBytes)
      const secondsLeft = leftBytes === null || bytesPerSecond === 0 ? null : Math.ceil(leftBytes / bytesPerSecond)
      return { id, kind, subject, name: names.get(subject) ?? null, progressBytes, totalBytes, bytesPerSecond, secondsLeft }
    })
  }

  #volumes(): Map<string, VolumeLook> {
    const { exports, mapper } = this.#options
    const volumes = new Map<string, VolumeLook>()
    for (const { resourceId, name, device, connections } of exports.list()) {
      const known = volumes.get(resourceId)
      const open = mapper.opened(resourceId)
      if (known !== undefined) known.connections += connections.size
      else if (open !== undefined)
        volumes.set(resourceId, { name, poolId: open.poolId, connections: connections.size, device, totals: totalsOf(device) })
    }
    return volumes
  }

  #volumeActivity(options: {
    id: string
    volume: VolumeLook
    before: DeviceTotals
    pool: string
    seconds: number
  }): VolumeActivity {
    const { id, volume, before, pool, seconds } = options
    const { name, connections, totals } = volume
    const perSecond = (counter: 'readBytes' | 'writeBytes' | 'throttledOperations'): number =>
      Math.max(0, totals[counter] - before[counter]) / seconds
    const kinds = (['read', 'write', 'discard', 'flush'] as const).map((kind) => latenciesSince(before[kind], totals[kind]))
    // Little's law: what was waited for together, by how long it was. Of what never ended, only that it is there is known.
    const servedDepth = kinds.reduce((sum, { sumSeconds }) => sum + sumSeconds, 0) / seconds
    return {
      id,
      name,
      pool,
      connections,
      reads: this.#operations(before.read, totals.read, seconds),
      writes: this.#operations(before.write, totals.write, seconds),
      discards: this.#operations(before.discard, totals.discard, seconds),
      flushes: this.#operations(before.flush, totals.flush, seconds),
      readBytesPerSecond: perSecond('readBytes'),
      writeBytesPerSecond: perSecond('writeBytes'),
      queueDepth: servedDepth > 0 ? servedDepth : totals.requestsWaiting,
      throttledPerSecond: perSecond('throttledOperations'),
    }
  }

  #operations(before: Latencies, after: Latencies, seconds: number): OperationActivity {
    const since = latenciesSince(before, after)
    const [mean, p99] = [meanSeconds(since), quantileSeconds(since, 0.99, this.#bucketEnds)]
    return {
      perSecond: latencyCount(since) / seconds,
      meanMs: mean === null ? null : mean * 1000,
      p99Ms: p99 === null ? null : p99 * 1000,
    }
  }

  async #lookForSlow(): Promise<void> {
    const { log, mapper } = this.#options
    const before = this.#lastPools
    const after = mapper.pools.totals()
    this.#lastPools = after
    try {
      const rows = await mapper.pools.list()
      for (const id of this.#slow) if (!rows.some((row) => row.id === id)) this.#slow.delete(id)
      for (const { id, name } of rows) {
        const [earlier, later] = [before.get(id) ?? noTotals, after.get(id) ?? noTotals]
        const [isSlow, wasSlow] = [isSlowBackend(earlier, later), this.#slow.has(id)]
        if (isSlow === wasSlow) continue
        if (isSlow) this.#slow.add(id)
        else this.#slow.delete(id)
        const read = latenciesSince(earlier.backendRead, later.backendRead)
        const sync = latenciesSince(earlier.backendSync, later.backendSync)
        const values = {
          pool: name,
          poolId: id,
          reads: latencyCount(read),
          readMs: inMs(read),
          readsRunning: later.backendReadsRunning,
          syncs: latencyCount(sync),
          syncMs: inMs(sync),
          syncsRunning: later.backendSyncsRunning,
        }
        if (isSlow) log.warn(values, 'the backend of the pool is slow: look at its disk')
        else log.info(values, 'the backend of the pool is not slow any more')
      }
    } catch (error) {
      log.debug({ err: error }, 'the backends could not be looked at')
    }
  }
}

/** Whether a backend was slow between two looks. */
export function isSlowBackend(before: DeviceTotals, after: DeviceTotals): boolean {
  const isSlow = (latencies: Latencies, limitMs: number, runningBefore: number, runningAfter: number): boolean => {
    const mean = meanSeconds(latencies)
    return mean === null ? runningBefore > 0 && runningAfter > 0 : mean * 1000 > limitMs
  }
  return (
    isSlow(
      latenciesSince(before.backendRead, after.backendRead),
      slowReadMs,
      before.backendReadsRunning,
      after.backendReadsRunning,
    ) ||
    isSlow(
      latenciesSince(before.backendSync, after.backendSync),
      slowSyncMs,
      before.backendSyncsRunning,
      after.backendSyncsRunning,
    )
  )
}

function inMs(latencies: Latencies): number | null {
  const mean = meanSeconds(latencies)
  return mean === null ? null : Math.round(mean * 1000)
}

function byName(a: { name: string; id: string }, b: { name: string; id: string }): number {
  return a.name < b.name || (a.name === b.name && a.id < b.id) ? -1 : 1
}
