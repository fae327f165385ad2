/** The job that moves a volume, and its snapshots if that is wanted, into another pool while it is in use. */
import { migrateKindName, type MoveRequest } from '@atoll/mapper'
import type { JobKind } from './job-kind.ts'
import { detailsOf, progressOf, runMove, type MoveParams, type Moves } from './move-job.ts'

/** The subject is the volume. */
export interface MigrateParams extends MoveParams {
  withSnapshots: boolean
}

export function migrateKind(moves: Moves, requestReclaim: () => void): JobKind {
  return {
    kind: migrateKindName,
    pausable: true,
    limitable: true,
    parallelMax: 2,
    details: detailsOf,
    run: (context) => runMove(context, moves, requestOf(context)),
    discard: async (context) => {
      await moves.release(requestOf(context))
      if (progressOf(context.cursor).phase === 'drop') requestReclaim()
    },
  }
}

function requestOf({ jobId, subject, params }: { jobId: string; subject: string; params: object }): MoveRequest {
  const { targetPoolId, withSnapshots } = params as MigrateParams
  return { jobId, volumeId: subject, targetPoolId, withSnapshots }
}
