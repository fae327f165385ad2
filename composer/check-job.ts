/** The job that looks over the catalog and the pools, and repairs what it is allowed to. */
import { adminProject, isAtollError, type JsonObject } from '@atoll/core'
import type { CheckFinding, CheckReport, Mapper } from '@atoll/mapper'
import type { JobContext, JobKind, JobView } from './job-kind.ts'
import type { Jobs } from './jobs.ts'

/** Findings kept with the job, the worst: its row is in the catalog. */
export const checkJobFindingsMax = 200

export interface CheckParams {
  /** Puts right what can be without losing anything. */
  repair: boolean
  /** Looks at every layer for space that nothing refers to. */
  deep: boolean
}

/** What a finished job says. */
export interface CheckResult extends Omit<CheckReport, 'findings'> {
  findings: readonly CheckFinding[]
  /** Findings that are only counted. */
  more: number
}

export function checkKind(mapper: Mapper): JobKind {
  return {
    kind: 'check',
    // It looks at one state: it cannot go on later where it was.
    pausable: false,
    movesBytes: false,
    // Recorded on a full disk, too: then most of all somebody wants to know.
    freesSpace: true,
    parallelMax: 1,
    run: async (context) => await check(context, mapper),
  }
}

async function check(context: JobContext, mapper: Mapper): Promise<JsonObject> {
  const { repair, deep } = context.params as unknown as CheckParams
  try {
    const report = await mapper.check({
      repair,
      deep,
      signal: context.signal,
      onProgress: (donePages, totalPages) => context.report(donePages, totalPages),
    })
    const { errors, warnings, notes, repaired } = report
    const findings = report.findings.slice(0, checkJobFindingsMax)
    const total = errors + warnings + notes + repaired
    const result: CheckResult = { errors, warnings, notes, repaired, findings, more: total - findings.length }
    return result as unknown as JsonObject
  } catch (error) {
    // The mapper's word for a signal that was aborted; the runner knows what was asked for.
    if (isAtollError(error, 'JOB_CANCELLED')) context.checkInterrupted()
    throw error
  }
}

export class CheckService {
  private readonly jobs: Jobs

  constructor(jobs: Jobs) {
    this.jobs = jobs
  }

  /** Starts a check of everything. @throws AtollError JOB_QUEUE_FULL */
  async start({ repair, deep }: CheckParams): Promise<JobView> {
    return await this.jobs.start({ projectId: adminProject.id, kind: 'check', subject: 'catalog', params: { repair, deep } })
  }
}
