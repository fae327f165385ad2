import type { Command } from 'commander'
import type { JobDocument } from '../admin-types.ts'
import { segment } from '../client/admin-client.ts'
import { formatBytes, formatSeconds } from '../terminal/format-bytes.ts'
import { formatFields, formatTable } from '../terminal/table.ts'
import { contextOf, withExample } from './command-context.ts'

export function register(job: Command): void {
  withExample(
    job
      .command('list')
      .description('show all jobs, the newest first')
      .action(async (_options: unknown, command: Command) => {
        const context = contextOf(command)
        const documents = await context.client.get<JobDocument[]>('/v1/jobs')
        context.print(documents, () =>
          formatTable(
            ['id', 'kind', 'subject', 'state', 'progress', 'updated'],
            documents.map((document) => [
              document.id,
              document.kind,
              document.subject,
              document.state,
              progressText(document),
              document.updatedAt,
            ]),
          ),
        )
      }),
    'atoll job list',
  )
  withExample(
    job
      .command('show')
      .description('show one job')
      .argument('<id>')
      .action(async (id: string, _options: unknown, command: Command) => {
        const context = contextOf(command)
        const document = await context.client.get<JobDocument>(`/v1/jobs/${segment(id)}`)
        context.print(document, () => jobText(document))
      }),
    'atoll job show 5f0c1c1e-8d1c-4e57-9a34-1c9c55f6a5f0',
  )
  for (const [verb, description] of [
    ['pause', 'stop a job after its current step; it keeps its place'],
    ['resume', 'go on with a paused or failed job'],
    ['cancel', 'stop a job and undo what it has done'],
  ] as const) {
    withExample(
      job
        .command(verb)
        .description(description)
        .argument('<id>')
        .action(async (id: string, _options: unknown, command: Command) => {
          const context = contextOf(command)
          const document = await context.client.post<JobDocument>(`/v1/jobs/${segment(id)}/${verb}`)
          context.print(document, () => `${document.id} ${document.state}`)
        }),
      `atoll job ${verb} 5f0c1c1e-8d1c-4e57-9a34-1c9c55f6a5f0`,
    )
  }
  withExample(
    job
      .command('limit')
      .description('change how fast a job that moves a volume or drains a pool copies')
      .argument('<id>')
      .argument('<rate>', 'bytes per second, or with K, M, G, T; none: as fast as it goes')
      .action(async (id: string, rate: string, _options: unknown, command: Command) => {
        const context = contextOf(command)
        const document = await context.client.post<JobDocument>(`/v1/jobs/${segment(id)}/limit`, { limit: rate })
        context.print(document, () => `${document.id} ${document.state}, ${limitText(document) ?? 'no limit'}`)
      }),
    'atoll job limit 5f0c1c1e-8d1c-4e57-9a34-1c9c55f6a5f0 100M',
    'atoll job limit 5f0c1c1e-8d1c-4e57-9a34-1c9c55f6a5f0 none',
  )
}

function limitText(job: JobDocument): string | null {
  const limit = job.params['limitBytesPerSecond']
  return typeof limit === 'number' ? `at most ${formatBytes(limit)}/s` : null
}

/** `copied 4 GiB, offloaded 1 GiB, …`: what the kind of the job says of itself. */
function detailsText(job: JobDocument): string | null {
  if (job.details === null) return null
  return Object.entries(job.details)
    .map(([name, value]) =>
      typeof value === 'number' && name.endsWith('Bytes') ? detailOf(name, value) : `${name} ${String(value)}`,
    )
    .join(', ')
}

function detailOf(name: string, bytes: number): string {
  return `${name.slice(0, -'Bytes'.length)} ${formatBytes(bytes)}`
}

function progressText(job: JobDocument): string {
  if (job.totalBytes === null) return formatBytes(job.progressBytes)
  return `${formatBytes(job.progressBytes)} of ${formatBytes(job.totalBytes)}`
}

function jobText(job: JobDocument): string {
  return formatFields([
    ['id', job.id],
    ['kind', job.kind],
    ['subject', job.subject],
    ['state', job.state],
    ['waiting', job.waiting],
    ['progress', progressText(job)],
    ['rate', job.rateBytesPerSecond > 0 ? `${formatBytes(job.rateBytesPerSecond)}/s` : null],
    ['left', job.secondsLeft === null ? null : formatSeconds(job.secondsLeft)],
    ['limit', limitText(job)],
    ['details', detailsText(job)],
    ['error', job.error === null ? null : `${job.error.code}: ${job.error.message}`],
    ['result', job.result === null || job.result === undefined ? null : JSON.stringify(job.result)],
    ['created', job.createdAt],
    ['updated', job.updatedAt],
  ])
}
