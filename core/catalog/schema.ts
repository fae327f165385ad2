/**
 * The tables of the catalog as Kysely sees them.
 *
 * Rules that hold for every table:
 * - a row that belongs to somebody has `project_id`;
 * - times are milliseconds since 1970 (a number), sizes are bytes, ids are lower-case UUIDs;
 * - integers are numbers (every one of them stays below 2^53), but for `root_word`, which is a bigint;
 * - a column name means the same in every table, because values are converted by the name of their column: `root_word`
 *   <-> bigint, `read_only`, `shared`, `versioned`, `is_current`, `delete_marker`, `is_primary` and `is_copy` <-> boolean, and `options`,
 *   `throttle`, `params`, `cursor`, `result`, `metadata`, `settings` <-> an object stored as JSON text. A conversion follows the
 *   origin of a column, so an alias (`root_word as word`) keeps it.
 */
import type { Generated, Insertable, Selectable, Updateable } from 'kysely'

/** making -> spare -> active -> closing -> sealed -> condemned -> the row is deleted after the files are gone. */
export const layerStates = ['making', 'spare', 'active', 'closing', 'sealed', 'condemned'] as const
export type LayerState = (typeof layerStates)[number]

export const replicaStates = ['complete', 'filling', 'condemned'] as const
export type ReplicaState = (typeof replicaStates)[number]

export const resourceKinds = ['volume', 'snapshot', 'image', 'file'] as const
export type ResourceKind = (typeof resourceKinds)[number]

/**
 * creating: rows are there, content is not (an import, a clone on its way); available: can be used; deleting: a job is
 * taking it apart; error: a job failed half-way, only a delete is allowed.
 */
export const resourceStatuses = ['creating', 'available', 'deleting', 'error'] as const
export type ResourceStatus = (typeof resourceStatuses)[number]

export const attachmentProtocols = ['nbd', 'iscsi'] as const
export type AttachmentProtocol = (typeof attachmentProtocols)[number]

export const jobStates = ['queued', 'running', 'paused', 'failed', 'cancelled', 'done'] as const
export type JobState = (typeof jobStates)[number]

/** What a JSON column may hold at its top: an object. */
export type JsonObject = { [key: string]: JsonValue }
export type JsonValue = string | number | boolean | null | JsonValue[] | JsonObject

export interface MetaTable {
  key: string
  value: string
}

/** One row; see catalog-owner.ts. */
export interface CatalogOwnerTable {
  id: number
  /** Raised whenever a process becomes the owner; 0: there was none. */
  epoch: number
  /** The owner's name, for people. */
  holder: string
}

export interface ProjectsTable {
  id: string
  name: string
  created_at: number
}

export interface PoolsTable {
  id: string
  project_id: string
  name: string
  driver: string
  /** The driver's options as the user gave them. */
  options: Record<string, string>
  /** What the operator set since, as it was typed; what is not there has its default. */
  settings: Generated<Record<string, string>>
  created_at: number
}

export interface LayersTable {
  /** The u32 of maps; AUTOINCREMENT, so that it is never used twice. */
  alias: Generated<number>
  /** The UUID that names its files. */
  id: string
  project_id: string
  /** The volume that writes it or wrote it; null for a spare that nobody has yet, and after the volume was deleted. */
  volume_id: string | null
  state: LayerState
  /** Epoch of the lease under which it is written. */
  epoch: number
  created_at: number
}

/** The bytes of a layer in one pool. Only a sealed layer may have several. */
export interface ReplicasTable {
  layer_alias: number
  pool_id: string
  project_id: string
  /** filling: it is being made, and nobody reads it. condemned: it is removed, and the layer stays. */
  state: ReplicaState
  /** Read by the resources of every pool without a replica of its own; at most one of a layer. */
  is_primary: Generated<boolean>
  /** The job that writes into it, also where it was complete before; null: nobody does. */
  filling_job: Generated<string | null>
  /** Filled from another one: what was zero there was not written, and it has no journal. A trigger sets it (migration 0008). */
  is_copy: Generated<boolean>
}

export interface ResourcesTable {
  id: string
  project_id: string
  kind: ResourceKind
  name: string
  size_bytes: number
  /** Root of the durable map. */
  root_word: bigint
  root_crc: number
  home_pool_id: string
  /** Raised with every change of the home. */
  home_epoch: Generated<number>
  /** What it was made from; null if that is gone or there was nothing. Information, not a dependency. */
  parent_id: string | null
  /** The volume of a snapshot; null for every other kind. */
  volume_id: string | null
  status: ResourceStatus
  created_at: number
  updated_at: number
}

export interface VolumesTable {
  /** The resource. An image that is being imported has a row too, because it is written like a volume. */
  id: string
  project_id: string
  active_alias: number
  next_alias: number | null
  /** The durable map includes every frame up to this lsn. */
  map_lsn: number
  /** Epoch of the last lease. */
  epoch: number
  /** Pages from this id on were made after the root was last shared: a checkpoint that replaces one deletes it. */
  shared_below_page: number
  /** Rate limits, as the engine takes them; null: none. */
  throttle: JsonObject | null
}

export interface LeasesTable {
  volume_id: string
  project_id: string
  holder: string
  epoch: number
  acquired_at: number
  /** null: held, or its holder died. */
  released_at: number | null
  /** The batch logs under which it was opened last; null: not known. */
  log_id: Generated<string | null>
  /** The first epoch since which no other batch logs were used: what they hold of an older one means nothing. */
  log_since_epoch: Generated<number>
}

export interface AttachmentsTable {
  id: string
  project_id: string
  volume_id: string
  protocol: AttachmentProtocol
  read_only: boolean
  shared: boolean
  options: JsonObject
  created_at: number
  /** The home whose sockets it names; empty: the one in which the catalog lies; null: not known, so whoever is active. */
  home: Generated<string | null>
}

export interface JobsTable {
  id: string
  project_id: string
  kind: string
  /** Id of what the job works on. */
  subject: string
  state: JobState
  progress_bytes: number
  /** null: not known. */
  total_bytes: number | null
  params: JsonObject
  /** Where to go on after a restart; null: from the start. */
  cursor: JsonObject | null
  result: JsonObject | null
  error_code: string | null
  error_message: string | null
  created_at: number
  updated_at: number
}

export interface PagesTable {
  id: number
  body: Uint8Array
}

export interface PageRangesTable {
  /** Pages first_page_id <= id < end_page_id belong to a checkpoint that is not finished; deleted at the next start. */
  first_page_id: number
  end_page_id: number
  volume_id: string
}

export interface ContainersTable {
  id: string
  project_id: string
  /** Unique in its project. */
  name: string
  /** Puts and deletes keep what was there before as a version. */
  versioned: boolean
  metadata: Record<string, string>
  created_at: number
  updated_at: number
}

/** What is in a container, old versions left out; written by triggers (migration 0006). */
export interface ContainerCountsTable {
  container_id: string
  file_count: number
  /** Of all sizes together: the bytes are `size_high * 2 ** 32 + size_low`, and `size_low` may be any number. */
  size_high: number
  size_low: number
}

export interface FilesTable {
  /** The resource with the content; also the version's id. */
  id: string
  project_id: string
  container_id: string
  /** The resource has the beginning of it. */
  name: string
  /** What the name means now; at most one of a name. */
  is_current: boolean
  /** Made while the container was versioned: a later put or delete keeps it. */
  versioned: boolean
  /** Stands for a delete in a versioned container; it has no content and is never current. */
  delete_marker: boolean
  /** MD5 of the content in hexadecimal digits; null: not known. */
  etag: string | null
  content_type: string
  metadata: Record<string, string>
  /** Later than that of every version of the name that was there before, so that it orders them. */
  created_at: number
}

/** The outbox of the pools' exports; written by triggers (migration 0003). */
export interface ExportChangesTable {
  /** AUTOINCREMENT, without gaps. */
  seq: Generated<number>
  /**
   * A table; or `pages`, whose key is FIRST:END; `tree`, whose key is the resource whose pages lie in other pools' exports; `link`,
   * for what the pool's export says of other pools.
   */
  table_name: string
  row_key: string
  /** The pool whose export has the row; null: every one. */
  pool_id: string | null
}

export interface ExportPoolsTable {
  pool_id: string
  /** Number of the last delta record that is known to be there. */
  record_number: number
  /** With that record the export is complete up to this change. */
  outbox_seq: number
  /** 1: the export was found to be newer than this catalog, so it is not written. */
  is_ahead: number
  /** The catalog that the pool was taken over from; null: it was always ours. */
  taken_from: string | null
}

export interface Schema {
  meta: MetaTable
  catalog_owner: CatalogOwnerTable
  projects: ProjectsTable
  pools: PoolsTable
  layers: LayersTable
  replicas: ReplicasTable
  resources: ResourcesTable
  volumes: VolumesTable
  leases: LeasesTable
  attachments: AttachmentsTable
  jobs: JobsTable
  pages: PagesTable
  page_ranges: PageRangesTable
  containers: ContainersTable
  container_counts: ContainerCountsTable
  files: FilesTable
  export_changes: ExportChangesTable
  export_pools: ExportPoolsTable
}

export type ProjectRow = Selectable<ProjectsTable>
export type PoolRow = Selectable<PoolsTable>
export type LayerRow = Selectable<LayersTable>
export type ReplicaRow = Selectable<ReplicasTable>
export type ResourceRow = Selectable<ResourcesTable>
export type VolumeRow = Selectable<VolumesTable>
export type LeaseRow = Selectable<LeasesTable>
export type AttachmentRow = Selectable<AttachmentsTable>
export type JobRow = Selectable<JobsTable>
export type PageRangeRow = Selectable<PageRangesTable>
export type ContainerRow = Selectable<ContainersTable>
export type ContainerCountsRow = Selectable<ContainerCountsTable>
export type FileRow = Selectable<FilesTable>
export type NewResource = Insertable<ResourcesTable>
export type ResourceUpdate = Updateable<ResourcesTable>
export type NewJob = Insertable<JobsTable>
export type JobUpdate = Updateable<JobsTable>

/** The project that exists from the first migration on and that everything belongs to until others are made. */
export const adminProject = { id: '00000000-0000-4000-8000-000000000001', name: 'admin' } as const
