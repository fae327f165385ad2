/** The job that moves a volume, and its snapshots if that is wanted, into another pool while it is in use. */
import { migrateKindName, type MoveRequest } from '@atoll/mapper'
import type { JobKind } from './job-kind.ts'
import { type MoveJob, moveKind, type MoveParams, type Moves } from './move-job.ts'

/** The subject is the volume. */
export interface MigrateParams extends MoveParams {
  withSnapshots: boolean
}

export function migrateKind(moves: Moves, requestReclaim: () => void): JobKind {
  return moveKind(migrateKindName, moves, requestReclaim, requestOf)
}

function requestOf({ jobId, subject, params }: MoveJob): MoveRequest {
  const { targetPoolId, withSnapshots } = params as MigrateParams
  return { jobId, volumeId: subject, targetPoolId, withSnapshots }
}
