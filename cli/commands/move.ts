// What `migrate` and `pool drain` have in common: their options, what they say beforehand, and how they wait.
import type { Command } from 'commander'
import type { JobDocument, MoveDocument, PoolDocument } from '../admin-types.ts'
import { formatBytes } from '../terminal/format-bytes.ts'
import { contextOf } from './command-context.ts'
import { waitForJob } from './wait-for-job.ts'

export interface MoveOptions {
  readonly to: string
  readonly limit?: string
  readonly wait?: boolean
  readonly dryRun?: boolean
}

type MoveView = NonNullable<PoolDocument['draining']>

export function withMoveOptions(command: Command): Command {
  return command
    .requiredOption('--to <pool>', 'name or id of the pool that it moves to')
    .option('--limit <rate>', 'copy at most so many bytes per second, such as 100M (`atoll job limit` changes it)')
    .option('--wait', 'wait until it has moved, with progress')
    .option('--dry-run', 'say what would be copied, and change nothing')
}

/**
 * Asks the daemon to move `what`; says beforehand what is copied, then prints the id of the job, or waits for its end.
 * @throws CliError what the daemon refuses, and what the job ends with
 */
export async function move(command: Command, path: string, what: string, options: MoveOptions, more: object): Promise<void> {
  const context = contextOf(command)
  const body = { to: options.to, limit: options.limit, dryRun: options.dryRun === true, ...more }
  const started = await context.client.post<MoveDocument>(path, body)
  const { plan, job } = started
  if (job === null) {
    context.print(started, () => planText(plan))
    return
  }
  if (!context.json) process.stderr.write(`${planText(plan)}\n`)
  if (options.wait !== true) {
    context.print(started, () => job.id)
    return
  }
  const done = await waitForJob(context, job, what)
  context.print({ plan, job: done }, () => resultText(done, options.to))
}

function planText(plan: MoveDocument['plan']): string {
  const { resources, layerCount, bytesToCopy, bytesToOffload, bytesThere, targetFreeBytes } = plan
  const kinds = new Map(['volume', 'snapshot', 'image', 'file'].map((kind) => [kind, 0]))
  for (const { kind } of resources) kinds.set(kind, (kinds.get(kind) ?? 0) + 1)
  const counted = [...kinds]
    .filter(([, count]) => count > 0)
    .map(([kind, count]) => `${count} ${kind}${count === 1 ? '' : 's'}`)
    .join(', ')
  const bytes = [
    `${formatBytes(bytesToCopy)} to copy`,
    `${formatBytes(bytesToOffload)} that the backend shares without copying`,
    `${formatBytes(bytesThere)} there already`,
  ].join(', ')
  const free =
    targetFreeBytes === null
      ? 'how much is free in the target is not known'
      : `${formatBytes(targetFreeBytes)} free in the target`
  return `${counted === '' ? 'nothing' : counted} in ${layerCount} layers: ${bytes}; ${free}`
}

/** A job that moves something, in one line. */
export function moveText({ jobId, state, phase, to }: MoveView): string {
  return `to ${to}, ${phaseNames[phase]} (job ${jobId}${state === 'running' ? '' : `, ${state}`})`
}

/** The phases of a move (composer/move-job.ts), for people. */
const phaseNames = {
  freeze: 'turning writes to it',
  fill: 'copying',
  home: 'copied',
  drop: 'freeing the old place',
} as const satisfies Record<MoveView['phase'], string>

/** What the result of the job has; see composer/move-job.ts. */
interface MoveResult {
  readonly copiedBytes: number
  readonly offloadedBytes: number
  readonly freedBytes: number
  readonly pauseMs: number
}

function resultText(job: JobDocument, to: string): string {
  const { copiedBytes, offloadedBytes, freedBytes, pauseMs } = job.result as unknown as MoveResult
  const moved = `copied ${formatBytes(copiedBytes)}, shared ${formatBytes(offloadedBytes)}, freed ${formatBytes(freedBytes)}`
  return `moved to ${to}: ${moved}; clients were held up for at most ${Math.ceil(pauseMs)} ms`
}
