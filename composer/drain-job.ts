/** The job that moves everything that lies in a pool into another one; nothing new is made in the pool meanwhile and afterwards. */
import { drainKindName, type DrainRequest } from '@atoll/mapper'
import type { JobKind } from './job-kind.ts'
import { detailsOf, progressOf, runMove, type MoveParams, type Moves } from './move-job.ts'

/** The subject is the pool. */
export type DrainParams = MoveParams

export function drainKind(moves: Moves, requestReclaim: () => void): JobKind {
  return {
    kind: drainKindName,
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

function requestOf({ jobId, subject, params }: { jobId: string; subject: string; params: object }): DrainRequest {
  return { jobId, poolId: subject, targetPoolId: (params as DrainParams).targetPoolId }
}
