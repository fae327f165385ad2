/** The job that moves everything that lies in a pool into another one; nothing new is made in the pool meanwhile and afterwards. */
import { drainKindName, type DrainRequest } from '@atoll/mapper'
import type { JobKind } from './job-kind.ts'
import { type MoveJob, moveKind, type MoveParams, type Moves } from './move-job.ts'

/** The subject is the pool. */
export type DrainParams = MoveParams

export function drainKind(moves: Moves, requestReclaim: () => void): JobKind {
  return moveKind(drainKindName, moves, requestReclaim, requestOf)
}

function requestOf({ jobId, subject, params }: MoveJob): DrainRequest {
  return { jobId, poolId: subject, targetPoolId: (params as DrainParams).targetPoolId }
}
