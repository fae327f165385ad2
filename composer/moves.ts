/** What moving volumes asks of the mapper (`mapper.moves`); a test hands in its own. */
import type { JsonObject, ResourceKind } from '@atoll/core'

export interface MoveRequest {
  readonly jobId: string
  readonly volumeId: string
  readonly targetPoolId: string
  readonly withSnapshots: boolean
}

export interface DrainRequest {
  readonly jobId: string
  readonly poolId: string
  readonly targetPoolId: string
}

export interface MovePlan {
  readonly resources: readonly {
    readonly id: string
    readonly kind: ResourceKind
    readonly name: string
    readonly sizeBytes: number
  }[]
  readonly layerCount: number
  readonly bytesToCopy: number
  /** Shared by the backend instead of copied. */
  readonly bytesToOffload: number
  /** In the target already. */
  readonly bytesThere: number
  readonly targetFreeBytes: number
}

export interface Moves {
  plan(request: MoveRequest | DrainRequest): Promise<MovePlan>
  freeze(
    request: MoveRequest | DrainRequest,
    options: { deadlineMs: number; signal: AbortSignal },
  ): Promise<{ readonly pauseMs: number }>
  claim(
    request: MoveRequest | DrainRequest,
  ): Promise<{ readonly claimed: true; readonly plan: MovePlan } | { readonly claimed: false; readonly waitsForJobId: string }>
  fillNext(
    request: MoveRequest | DrainRequest,
    cursor: JsonObject | null,
    options: { limitBytesPerSecond: number | null; signal: AbortSignal },
  ): Promise<{
    readonly cursor: JsonObject
    readonly isDone: boolean
    readonly copiedBytes: number
    readonly offloadedBytes: number
    readonly skippedBytes: number
  }>
  home(request: MoveRequest | DrainRequest): Promise<void>
  drop(request: MoveRequest | DrainRequest, options: { signal: AbortSignal }): Promise<{ readonly freedBytes: number }>
  release(request: MoveRequest | DrainRequest): Promise<void>
}
