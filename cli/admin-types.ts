// The documents that the admin socket carries and `--json` prints. Only types: both sides import them without cost.
// They are the composer's views with times as ISO 8601 text.
import type { MovePlan } from '@atoll/mapper'
import type { BackupInfo, RestoredCatalog } from '@atoll/core'
import type {
  Activity,
  AttachmentView,
  CheckResult,
  ContainerView,
  FileView,
  ImageView,
  JobView,
  PoolAcceptView,
  PoolImportView,
  PoolsRead,
  PoolView,
  ResourceUsage,
  SnapshotView,
  VolumeView,
} from '@atoll/composer'

/** A view with its times as text. */
export type Document<View> = {
  [Field in keyof View]: Field extends 'createdAt' | 'updatedAt' ? string : DocumentField<View[Field]>
}
type DocumentField<Value> = Value extends readonly AttachmentView[] ? AttachmentDocument[] : Value

export type AttachmentDocument = Omit<AttachmentView, 'createdAt' | 'socketPath'> & {
  createdAt: string
  /** Path of the unix socket; null: clients use `server`. */
  socketPath: string | null
  /** Where clients connect over TCP; null: they use the unix socket. */
  server: { readonly host: string; readonly port: number; readonly tls: boolean } | null
}
/** A page of a listing. */
export interface PageDocument<Entry> {
  readonly entries: readonly Entry[]
  /** The marker of the next page; null: this is the last. */
  readonly next: string | null
}
export type VolumeSummary = Document<VolumeView>
export type CreatedVolumeDocument = Document<VolumeView & PoolsRead>
export type VolumeDocument = Document<VolumeView & ResourceUsage & PoolsRead>
export type SnapshotDocument = Document<SnapshotView>
export type ImageSummary = Document<ImageView>
export type ImageDocument = Document<ImageView & ResourceUsage & PoolsRead>
export type ContainerDocument = Document<ContainerView>
export type FileSummary = Document<FileView>
export type FileDocument = Document<FileView & ResourceUsage>
export interface FileListingDocument {
  readonly entries: readonly (FileSummary | { readonly commonPrefix: string })[]
  /** Where the next listing goes on; null: this is all. */
  readonly next: { readonly marker: string; readonly versionMarker: string | null } | null
}
export type PoolDocument = Document<PoolView>
export type ActivityDocument = Activity
export type PoolImportDocument = PoolImportView
export type PoolAcceptDocument = PoolAcceptView
export type JobDocument = Document<JobView>
export type CheckDocument = CheckResult
/** What `migrate` and `pool drain` answer. */
export interface MoveDocument {
  readonly plan: MovePlan
  /** null: it was only asked what would be moved. */
  readonly job: JobDocument | null
}
export type BackupDocument = BackupInfo & { readonly path: string }
export type RestoreDocument = RestoredCatalog

/** What `status` says of a daemon that stands by. */
export interface StandbyDocument extends Pick<
  StatusDocument,
  'ready' | 'version' | 'pid' | 'home' | 'http' | 'nbd' | 'nbdSocket' | 'iscsi' | 'uptimeSeconds'
> {
  /** The catalog that it shares, and who is active on it. */
  readonly standby: { readonly catalog: string; readonly active: string }
}

export interface StatusDocument {
  readonly ready: true
  readonly standby: null
  readonly version: string
  readonly pid: number
  readonly home: string
  readonly http: string | null
  readonly nbd: string | null
  readonly nbdSocket: string | null
  readonly iscsi: string | null
  readonly uptimeSeconds: number
  readonly pools: number
  readonly volumes: number
  readonly attachedVolumes: number
  readonly connections: number
  readonly runningJobs: number
  /** Names of the pools that are running out of space. */
  readonly lowSpacePools: readonly string[]
  /** Pools with whose backend something is the matter: kinds of conditions, or the code that keeps it from being opened. */
  readonly troubledPools: readonly { readonly name: string; readonly conditions: readonly string[] }[]
  /** Memory of all maps that are loaded. */
  readonly mapBytes: number
  readonly residentBytes: number
  /** How reads wait for disks: over io_uring, or on threads, and then why. */
  readonly waitingReads: { readonly path: 'io_uring' | 'threads'; readonly reason: string | null }
}
