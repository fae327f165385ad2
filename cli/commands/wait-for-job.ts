// Watches a job of the daemon: progress on a terminal, and Ctrl-C leaves the job running.
import type { JobDocument } from '../admin-types.ts'
import { CliError } from '../client/cli-error.ts'
import { ProgressLine } from '../terminal/progress.ts'
import type { CommandContext } from './command-context.ts'

/** How long one request waits in the daemon for the job to end: also how often progress is shown. */
const pollMs = 250

/**
 * Resolves with the job when it is done.
 * @throws CliError the job's own code when it failed, JOB_CANCELLED, or INTERRUPTED when the user stopped waiting
 */
export async function waitForJob(context: CommandContext, job: JobDocument, label: string): Promise<JobDocument> {
  const line = new ProgressLine(label, process.stderr)
  const interrupted = new AbortController()
  const interrupt = (): void => interrupted.abort()
  process.once('SIGINT', interrupt)
  try {
    let current = job
    while (current.state === 'queued' || current.state === 'running') {
      if (interrupted.signal.aborted) {
        throw new CliError(
          'INTERRUPTED',
          `job ${job.id} goes on in the daemon. See it with 'atoll job show ${job.id}'; 'atoll job pause', 'resume' and 'cancel' steer it`,
        )
      }
      current = await context.client.get<JobDocument>(`/v1/jobs/${job.id}`, { waitMs: pollMs })
      line.update(current)
    }
    return outcome(current)
  } finally {
    process.removeListener('SIGINT', interrupt)
    line.end()
  }
}

function outcome(job: JobDocument): JobDocument {
  if (job.state === 'failed') throw new CliError(job.error?.code ?? 'INTERNAL', job.error?.message ?? `job ${job.id} failed`)
  if (job.state === 'cancelled') throw new CliError('JOB_CANCELLED', `job ${job.id} was cancelled`)
  if (job.state === 'paused')
    throw new CliError('JOB_PAUSED', `job ${job.id} was paused; continue it with 'atoll job resume ${job.id}'`)
  return job
}
