/**
 * The migrations of the catalog, in order. The format version is how many of them were applied, so a migration that was
 * released is never changed, moved or removed.
 *
 * Rule for formats: a catalog of an older version is migrated forward when it is opened, each step in a transaction of its
 * own; one of a newer version is refused with FORMAT_VERSION and nothing is changed. There is no way back but a backup.
 */
import type { Kysely } from 'kysely'
import { createTables } from './0001-create-tables.ts'
import { createFiles } from './0002-files.ts'
import { addPoolSettings } from './0004-pool-settings.ts'
import { exportOutbox } from './0003-export-outbox.ts'
import { orderResources } from './0005-resource-order.ts'
import { countContainers } from './0006-container-counts.ts'
import { addCatalogOwner } from './0007-catalog-owner.ts'
import { addReplicas } from './0008-replicas.ts'

export interface Migration {
  readonly name: string
  /** Runs in a transaction. It knows the schema of its own time only, hence no table types. */
  up(tx: Kysely<unknown>): Promise<void>
}

export const migrations: readonly Migration[] = [
  createTables,
  createFiles,
  exportOutbox,
  addPoolSettings,
  orderResources,
  countContainers,
  addCatalogOwner,
  addReplicas,
]
