/** Resources as they are shown. Times are milliseconds since 1970. */
import type { ErrorData, ResourceRow } from '@atoll/core'
import type { AttachmentView } from './attachments.ts'
import type { MovePhase } from './move-job.ts'

/** As OpenStack calls them. */
export type VolumeStatus = 'creating' | 'available' | 'in-use' | 'error' | 'deleting'
export type SnapshotStatus = 'creating' | 'available' | 'error' | 'deleting'
export type ImageStatus = 'queued' | 'active' | 'error' | 'deleting'

export interface ResourceView {
  id: string
  projectId: string
  name: string
  sizeBytes: number
  /** Name of the home pool. */
  pool: string
  poolId: string
  /** Id of what it was made from; null if there was nothing or it is gone. */
  parent: string | null
  attachments: AttachmentView[]
  /** Why it is in error; null if it is not. */
  error: Pick<ErrorData, 'code' | 'message'> | null
  createdAt: number
  updatedAt: number
}

export interface ResourceUsage {
  /** Bytes that go when it is deleted; null: its map cannot be read, or maps differ in too much to tell. */
  usedBytes: number | null
  /** Bytes that others refer to, too; null as above. */
  sharedBytes: number | null
}

export interface PoolsRead {
  /** Names of the pools other than its own that it reads from: what it shares with what it was made from lies there. */
  readsFrom: string[]
}

/** A job that moves something into another pool. */
export interface MoveView {
  jobId: string
  state: 'queued' | 'running' | 'paused'
  phase: MovePhase
  /** Name of the pool that it moves to. */
  to: string
}

export interface VolumeView extends ResourceView {
  status: VolumeStatus
  /** null: it stays where it is. */
  move: MoveView | null
  /** Names of its snapshots, oldest first. */
  snapshots: string[]
}

export interface SnapshotView extends ResourceView {
  status: SnapshotStatus
  volumeId: string
  /** Name of the volume. */
  volume: string
}

export interface ImageView extends ResourceView {
  status: ImageStatus
  /** The job that makes it; null when it is made. */
  jobId: string | null
}

/** What views are made with. */
export interface ViewSources {
  poolNames: ReadonlyMap<string, string>
  /** By id of what is moved: a volume, or a pool that is drained. */
  moves: ReadonlyMap<string, MoveView>
  attachments: (resourceId: string) => AttachmentView[]
  errorOf: (resourceId: string) => Pick<ErrorData, 'code' | 'message'> | null
}

export function resourceView(row: ResourceRow, sources: ViewSources): ResourceView {
  const error = sources.errorOf(row.id)
  return {
    id: row.id,
    projectId: row.project_id,
    name: row.name,
    sizeBytes: row.size_bytes,
    pool: sources.poolNames.get(row.home_pool_id) ?? row.home_pool_id,
    poolId: row.home_pool_id,
    parent: row.parent_id,
    attachments: sources.attachments(row.id),
    error: error === null ? null : { code: error.code, message: error.message },
    createdAt: row.created_at,
    updatedAt: row.updated_at,
  }
}

export function volumeStatus(row: ResourceRow, view: ResourceView): VolumeStatus {
  if (view.error !== null) return 'error'
  if (row.status === 'available' && view.attachments.length > 0) return 'in-use'
  return row.status
}

export function snapshotStatus(row: ResourceRow, view: ResourceView): SnapshotStatus {
  return view.error === null ? row.status : 'error'
}

export function imageStatus(row: ResourceRow, view: ResourceView): ImageStatus {
  if (view.error !== null) return 'error'
  switch (row.status) {
    case 'creating':
      return 'queued'
    case 'available':
      return 'active'
    case 'deleting':
    case 'error':
      return row.status
    default:
      return row.status satisfies never
  }
}
