import type { Command } from 'commander'
import type { JobDocument } from '../admin-types.ts'
import { segment } from '../client/admin-client.ts'
import { formatBytes } from '../terminal/format-bytes.ts'
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
    ['progress', progressText(job)],
    ['error', job.error === null ? null : `${job.error.code}: ${job.error.message}`],
    ['result', job.result === null || job.result === undefined ? null : JSON.stringify(job.result)],
    ['created', job.createdAt],
    ['updated', job.updatedAt],
  ])
}
