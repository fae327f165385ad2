// What is measured of a daemon, as Prometheus takes it. Anybody who reaches the HTTP listener may read the text without volumes:
// it tells of pools and of all volumes together, and names no volume and no project.
import { stat } from 'node:fs/promises'
import { performance } from 'node:perf_hooks'
import type { Clock } from '@atoll/core'
import type { Composer, PoolState, VolumeTotals } from '@atoll/composer'
import { latencyBucketEndsSeconds, type Engine } from '@atoll/native'
import { version } from '../../version.ts'
import type { Ownership } from '../ownership.ts'
import type { EventLoopMonitor } from './event-loop.ts'
import { MetricsText, type Labels, type Sample } from './metrics-text.ts'

export interface MetricsSources {
  readonly ownership: Pick<Ownership, 'parts'>
  readonly engine: Engine
  readonly clock: Clock
  /** By `clock.monotonicMs`. */
  readonly startedAtMs: number
  readonly catalogPath: string
  readonly eventLoop: EventLoopMonitor
}

const none: Labels = {}
const kinds = ['read', 'write', 'discard', 'flush'] as const

/** Everything at one time; `withVolumes`: and every attached volume by itself. */
export async function collectMetrics(sources: MetricsSources, { withVolumes }: { withVolumes: boolean }): Promise<string> {
  const text = new MetricsText(latencyBucketEndsSeconds())
  await addDaemon(text, sources)
  const composer = sources.ownership.parts?.composer
  if (composer === undefined) return text.toString()
  await addCounts(text, sources.engine, composer)
  addPools(text, await composer.pools.states())
  if (withVolumes) addVolumes(text, await composer.activity.volumeTotals())
  return text.toString()
}

async function addDaemon(text: MetricsText, sources: MetricsSources): Promise<void> {
  const { ownership, engine, clock, startedAtMs, catalogPath, eventLoop } = sources
  const native = engine.stats()
  const cpu = process.cpuUsage()
  const memory = process.memoryUsage()
  const delay = eventLoop.delay()
  const one = (value: number): Sample[] => [[none, value]]
  text.gauge('atoll_build_info', 'Always 1; the label is the version.', [[{ version }, 1]])
  text.gauge('atoll_active', '1; 0 while another daemon is active on the catalog.', one(ownership.parts === null ? 0 : 1))
  text.gauge('atoll_uptime_seconds', 'Since the daemon was started.', one((clock.monotonicMs() - startedAtMs) / 1000))
  text.counter('process_cpu_seconds_total', 'Processor time of the daemon.', one((cpu.user + cpu.system) / 1e6))
  text.gauge('process_resident_memory_bytes', 'Memory of the daemon.', one(memory.rss))
  text.gauge('atoll_heap_used_bytes', 'Memory in use by JavaScript.', one(memory.heapUsed))
  text.gauge('atoll_map_memory_bytes', 'Memory of the maps that are loaded.', one(native.mapBytes))
  text.gauge('atoll_map_memory_limit_bytes', 'What the maps are kept within.', one(native.mapBoundBytes))
  text.counter(
    'atoll_event_loop_active_seconds_total',
    'Time in which the event loop had something to do.',
    one(performance.eventLoopUtilization().active / 1000),
  )
  text.gauge('atoll_event_loop_delay_p99_seconds', 'Delay of the event loop in the last ten seconds.', one(delay.p99Seconds))
  text.gauge(
    'atoll_event_loop_delay_max_seconds',
    'Longest delay of the event loop in the last ten seconds.',
    one(delay.maxSeconds),
  )
  text.gauge('atoll_catalog_size_bytes', 'The catalog and its write-ahead log.', [
    [{ file: 'catalog' }, await sizeOf(catalogPath)],
    [{ file: 'wal' }, await sizeOf(`${catalogPath}-wal`)],
  ])
}

async function addCounts(text: MetricsText, engine: Engine, composer: Composer): Promise<void> {
  const status = await composer.status()
  const native = engine.stats()
  const one = (value: number): Sample[] => [[none, value]]
  const jobs = Object.entries(composer.jobs.unfinished())
  text.gauge(
    'atoll_jobs',
    'Unfinished jobs.',
    jobs.map(([state, count]) => [{ state }, count]),
  )
  text.gauge('atoll_volumes', 'Volumes.', one(status.volumes))
  text.gauge('atoll_attached', 'Volumes, snapshots and images that are attached.', one(status.attachedVolumes))
  text.gauge('atoll_open_devices', 'Open devices, those of jobs included.', one(native.openDevices))
  text.gauge('atoll_connections', 'Clients of attached volumes.', one(status.connections))
}

async function sizeOf(path: string): Promise<number> {
  try {
    return (await stat(path)).size
  } catch {
    // No write-ahead log, or no file at all.
    return 0
  }
}

function addPools(text: MetricsText, pools: readonly PoolState[]): void {
  const samples = (value: (pool: PoolState) => number | null): Sample[] =>
    pools.flatMap((pool) => {
      const found = value(pool)
      return found === null ? [] : [[{ pool: pool.name }, found] as const]
    })
  text.gauge(
    'atoll_pool_up',
    'Whether the pool is open.',
    samples(({ space }) => (space === null ? 0 : 1)),
  )
  const bytes = [
    ['total', 'Size of the backend.', 'totalBytes'],
    ['free', 'Free for new data.', 'freeBytes'],
    ['stored', 'Allocated by the pool.', 'storedBytes'],
    ['reserve', 'Kept back for deletes on a full backend.', 'reserveBytes'],
    ['low_space_threshold', 'The alarm is on when less is free; 0: never.', 'lowSpaceBytes'],
    ['provisioned', 'What the volumes of the pool have together.', 'provisionedBytes'],
    ['provisioned_limit', 'What they may have together; not there: as much as they like.', 'provisionedMaxBytes'],
  ] as const
  for (const [name, help, field] of bytes)
    text.gauge(
      `atoll_pool_${name}_bytes`,
      help,
      samples(({ space }) => space?.[field] ?? null),
    )
  text.gauge(
    'atoll_pool_low_space',
    'Whether the alarm is on.',
    samples(({ lowSpace }) => Number(lowSpace)),
  )
  text.gauge(
    'atoll_pool_slow',
    'Whether the backend was slow when it was looked at last.',
    samples(({ slow }) => Number(slow)),
  )
  text.gauge(
    'atoll_pool_condition',
    'Always 1: what is the matter with the backend of an open pool.',
    pools.flatMap(({ name, health }) =>
      [...new Map(health?.conditions.map(({ kind, severity }) => [kind, severity]))].map(
        ([condition, severity]) => [{ pool: name, condition, severity }, 1] as const,
      ),
    ),
  )
  text.gauge(
    'atoll_pool_answer_seconds',
    'How long a small read of the backend took when it was tried last; not there: it was not answered, or nobody tries.',
    samples(({ health }) => (health === null || health.answerMs === null ? null : health.answerMs / 1000)),
  )
  text.gauge('atoll_pool_backend_running', 'Reads and syncs that wait for the backend.', [
    ...pools.map(({ name, totals }) => [{ pool: name, operation: 'read' }, totals.backendReadsRunning] as const),
    ...pools.map(({ name, totals }) => [{ pool: name, operation: 'sync' }, totals.backendSyncsRunning] as const),
  ])
  text.histogram('atoll_pool_backend_seconds', 'How long reads that had to wait for the backend took, and syncs.', [
    ...pools.map(({ name, totals }) => [{ pool: name, operation: 'read' }, totals.backendRead] as const),
    ...pools.map(({ name, totals }) => [{ pool: name, operation: 'sync' }, totals.backendSync] as const),
  ])
  addTraffic(
    text,
    'atoll_pool',
    pools.map(({ name, totals }) => ({ labels: { pool: name }, totals })),
  )
}

function addVolumes(text: MetricsText, volumes: readonly VolumeTotals[]): void {
  const found = volumes.map((volume) => ({
    volume,
    labels: { volume: volume.id },
  }))
  // What else is known of a volume stands here once, and is joined by its id: series are many.
  text.gauge(
    'atoll_volume_info',
    'Always 1; the labels say which volume it is.',
    volumes.map(({ id, name, pool, projectId }) => [{ volume: id, name, pool, project: projectId }, 1]),
  )
  text.gauge(
    'atoll_volume_size_bytes',
    'Size of the volume.',
    found.map(({ labels, volume }) => [labels, volume.sizeBytes]),
  )
  text.gauge(
    'atoll_volume_connections',
    'Clients of the volume.',
    found.map(({ labels, volume }) => [labels, volume.connections]),
  )
  text.gauge(
    'atoll_volume_journal_bytes',
    'Journal since the last checkpoint.',
    found.map(({ labels, volume }) => [labels, volume.journalBytes]),
  )
  text.gauge(
    'atoll_volume_requests_waiting',
    'Requests of clients that workers have.',
    found.map(({ labels, volume }) => [labels, volume.totals.requestsWaiting]),
  )
  addTraffic(
    text,
    'atoll_volume',
    found.map(({ labels, volume }) => ({ labels, totals: volume.totals })),
  )
}

/** What clients did: how often, how much, how long it took. */
function addTraffic(text: MetricsText, prefix: string, of: readonly { labels: Labels; totals: PoolState['totals'] }[]): void {
  text.counter(`${prefix}_transferred_bytes_total`, 'Bytes that were read and written, by clients and jobs.', [
    ...of.map(({ labels, totals }) => [{ ...labels, operation: 'read' }, totals.readBytes] as const),
    ...of.map(({ labels, totals }) => [{ ...labels, operation: 'write' }, totals.writeBytes] as const),
  ])
  text.counter(
    `${prefix}_throttled_requests_total`,
    'Requests that waited for the rate limit.',
    of.map(({ labels, totals }) => [labels, totals.throttledOperations]),
  )
  text.histogram(
    `${prefix}_request_seconds`,
    'From when a request of a client was received until its answer was ready.',
    of.flatMap(({ labels, totals }) =>
      kinds
        // What never happened would be most of the text.
        .filter((operation) => totals[operation].counts.length > 0)
        .map((operation) => [{ ...labels, operation }, totals[operation]] as const),
    ),
  )
}
