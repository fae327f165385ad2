import type { Command } from 'commander'
import type { ActivityDocument } from '../admin-types.ts'
import { usageError } from '../client/cli-error.ts'
import { formatBytes, formatSeconds } from '../terminal/format-bytes.ts'
import { formatTable } from '../terminal/table.ts'
import { contextOf, withExample } from './command-context.ts'

/** Clears the terminal and puts the cursor at its top. */
const clearTerminal = '\u001b[H\u001b[2J'

export function register(top: Command): void {
  top
    .option('--interval <seconds>', 'how long each figure is taken for, 0.1 to 60', '1')
    .option('--once', 'print one interval and end (with --json: always)')
    .action(async (options: { interval: string; once?: boolean }) => {
      const context = contextOf(top)
      const intervalMs = Math.round(Number(options.interval) * 1000)
      if (!(intervalMs >= 100 && intervalMs <= 60_000))
        throw usageError(`--interval ${options.interval}: 0.1 to 60 seconds are possible`)
      const take = (): Promise<ActivityDocument> => context.client.get<ActivityDocument>('/v1/activity', { intervalMs })
      if (options.once === true || context.json) {
        const document = await take()
        context.print(document, () => activityText(document))
        return
      }
      // What ends it is Ctrl-C, and that is no failure.
      process.once('SIGINT', () => process.exit(0))
      for (;;) {
        const text = activityText(await take())
        process.stdout.write(process.stdout.isTTY ? `${clearTerminal}${text}\n` : `${text}\n\n`)
      }
    })
  withExample(top, 'atoll top --interval 5', 'atoll top --once --json')
}

/** Volumes first, the busiest at the top; then the backends of the pools, then what moves bytes in the background. */
export function activityText({ volumes, pools, jobs }: ActivityDocument): string {
  const busiest = volumes.toSorted((a, b) => load(b) - load(a))
  const parts = [
    volumes.length === 0
      ? 'no volume is attached'
      : formatTable(
          [
            'volume',
            'pool',
            'read/s',
            'write/s',
            'flush/s',
            'read',
            'write',
            'read ms',
            'write ms',
            'flush ms',
            'depth',
            'clients',
          ],
          busiest.map((volume) => [
            volume.name,
            volume.pool,
            rounded(volume.reads.perSecond),
            rounded(volume.writes.perSecond + volume.discards.perSecond),
            rounded(volume.flushes.perSecond),
            `${formatBytes(Math.round(volume.readBytesPerSecond))}/s`,
            `${formatBytes(Math.round(volume.writeBytesPerSecond))}/s`,
            latencyText(volume.reads),
            latencyText(volume.writes),
            latencyText(volume.flushes),
            rounded(volume.queueDepth),
            volume.connections,
          ]),
        ),
    formatTable(
      ['backend of pool', 'read/s', 'sync/s', 'read ms', 'sync ms', 'running', 'state'],
      pools.map((pool) => [
        pool.name,
        rounded(pool.reads.perSecond),
        rounded(pool.syncs.perSecond),
        latencyText(pool.reads),
        latencyText(pool.syncs),
        pool.reads.running + pool.syncs.running,
        pool.slow ? 'slow' : 'ok',
      ]),
    ),
    ...(jobs.length === 0 ? [] : [jobsTable(jobs)]),
    'ms: mean / 99th percentile',
  ]
  return parts.join('\n\n')
}

function jobsTable(jobs: ActivityDocument['jobs']): string {
  return formatTable(
    ['job', 'of', 'moved', 'rate', 'left', 'id'],
    jobs.map((job) => [
      job.kind,
      job.name ?? job.subject,
      job.totalBytes === null
        ? formatBytes(job.progressBytes)
        : `${formatBytes(job.progressBytes)} of ${formatBytes(job.totalBytes)}`,
      `${formatBytes(Math.round(job.bytesPerSecond))}/s`,
      job.secondsLeft === null ? null : formatSeconds(job.secondsLeft),
      job.id,
    ]),
  )
}

type Operations = ActivityDocument['volumes'][number]['reads']

function load({ reads, writes, discards, flushes }: ActivityDocument['volumes'][number]): number {
  return reads.perSecond + writes.perSecond + discards.perSecond + flushes.perSecond
}

function latencyText({ meanMs, p99Ms }: Operations): string | null {
  return meanMs === null || p99Ms === null ? null : `${rounded(meanMs)} / ${rounded(p99Ms)}`
}

/** Three digits: 0.0123, 1.23, 12.3, 1234. */
function rounded(value: number): number {
  return value >= 100 ? Math.round(value) : Number(value.toPrecision(3))
}
