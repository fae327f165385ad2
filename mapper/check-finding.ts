/** What a check finds, and what its parts share. */
import type { LayerRow, LeaseRow, PoolRow, ReplicaRow, ResourceRow, VolumeRow } from '@atoll/core'
import type { LayerListing } from '@atoll/southbound'
import type { MapperContext } from './context.ts'
import type { Reclaimer } from './reclaim.ts'

/** A kind is stable: scripts match it. */
export type CheckKind =
  | 'catalog-damaged'
  | 'reference-dangling'
  | 'root-invalid'
  | 'size-invalid'
  | 'volume-row-missing'
  | 'volume-row-extra'
  | 'volume-waiting'
  | 'layer-shared'
  | 'layer-state-wrong'
  | 'layer-of-nobody'
  | 'layer-stray'
  | 'replica-missing'
  | 'replica-of-nothing'
  | 'replica-primary-missing'
  | 'replica-primary-wrong'
  | 'replica-fill-stale'
  | 'replica-short'
  | 'epoch-behind'
  | 'volume-dirty'
  | 'lease-of-nothing'
  | 'attachment-of-nothing'
  | 'page-range-stale'
  | 'page-missing'
  | 'page-corrupt'
  | 'page-version'
  | 'page-garbage'
  | 'map-layer-unknown'
  | 'map-layer-condemned'
  | 'map-layer-unused'
  | 'map-shares-active'
  | 'layer-missing'
  | 'layer-unknown'
  | 'layer-short'
  | 'layer-unreferenced-data'
  | 'spare-missing'
  | 'spare-written'
  | 'seal-missing'
  | 'seal-damaged'
  | 'journal-corrupt'
  | 'journal-version'
  | 'journal-ahead'
  | 'catalog-behind'
  | 'catalog-older'
  | 'export-behind'
  | 'export-damaged'
  | 'backend-failed'
  | 'pool-unavailable'
  | 'pool-reader-missing'
  | 'pool-source-missing'
  // Of drivers: southbound/store-pool.ts.
  | (string & {})

export interface CheckFinding {
  /** error: something cannot be read or is not what it should be; warning: it may become so; note: nothing to worry about. */
  readonly severity: 'note' | 'warning' | 'error'
  readonly kind: CheckKind
  /** The id of a resource or layer, `page N`, a table, a path. */
  readonly object: string
  /** A sentence with what to do. */
  readonly message: string
  /** `--repair` puts it right without losing anything. */
  readonly repairable: boolean
  /** What a repair did; null: nothing. */
  readonly repair: string | null
}

/** A finding on its way: `mend` puts it right and says what it did, or null when there was nothing (any more). */
export interface Found extends Omit<CheckFinding, 'repairable' | 'repair'> {
  readonly mend?: () => Promise<string | null>
}

/** The rows that a check looks at, all of one state of the catalog. */
export interface CheckState {
  readonly resources: readonly ResourceRow[]
  readonly resourcesById: ReadonlyMap<string, ResourceRow>
  readonly volumes: readonly VolumeRow[]
  readonly volumesById: ReadonlyMap<string, VolumeRow>
  readonly layers: readonly LayerRow[]
  readonly layersByAlias: ReadonlyMap<number, LayerRow>
  /** Pools of the complete replicas of a layer. */
  readonly homes: ReadonlyMap<number, readonly string[]>
  readonly replicas: readonly ReplicaRow[]
  readonly leases: readonly LeaseRow[]
  readonly pools: readonly PoolRow[]
  /** Layers of the pools that are open, as they were before the rows were read. */
  readonly listings: ReadonlyMap<string, ReadonlyMap<string, LayerListing>>
}

export interface CheckContext {
  readonly mapper: MapperContext
  readonly reclaimer: Reclaimer
  readonly state: CheckState
  /** Looks at more, which takes longer: what is allocated and referred to by nothing. */
  readonly deep: boolean
  readonly add: (found: Found) => void
  /** Called between steps; throws when the check is to stop. */
  readonly step: (done?: number) => void
}

/** Resources named in one finding; their number is told. */
const namedMax = 5

/** How a message calls resources: `volume "a" (id), image "b" (id) and 3 more`. */
export function nameResources(rows: readonly ResourceRow[]): string {
  const named = rows.slice(0, namedMax).map((row) => `${row.kind} "${row.name}" (${row.id})`)
  const rest = rows.length - named.length
  return `${named.join(', ')}${rest > 0 ? ` and ${rest} more` : ''}`
}
