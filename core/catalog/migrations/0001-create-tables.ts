/** The first format: every table of a catalog. */
import { type CreateTableBuilder, sql } from 'kysely'
import type { Migration } from './index.ts'

/** Tables are STRICT: a text in an integer column is refused rather than kept. */
const strict = <Name extends string, Columns extends string>(table: CreateTableBuilder<Name, Columns>) =>
  table.modifyEnd(sql`strict`)

const oneOf = (column: string, values: readonly string[]) =>
  sql<boolean>`${sql.ref(column)} in (${sql.join(values.map((value) => sql.lit(value)))})`
const notNegative = (column: string) => sql<boolean>`${sql.ref(column)} >= 0`
const nameLength = sql<boolean>`length(name) between 1 and 255`

/*
 * References are checked when a transaction ends (deferred), so that rows that refer to each other may be written in any
 * order: a volume names its layers, and they name it.
 */
export const createTables: Migration = {
  name: '0001-create-tables',
  async up(tx) {
    const { schema } = tx
    await strict(
      schema
        .createTable('projects')
        .addColumn('id', 'text', (column) => column.primaryKey().notNull())
        .addColumn('name', 'text', (column) => column.notNull().check(nameLength))
        .addColumn('created_at', 'integer', (column) => column.notNull()),
    ).execute()

    await strict(
      schema
        .createTable('pools')
        .addColumn('id', 'text', (column) => column.primaryKey().notNull())
        .addColumn('project_id', 'text', (column) => column.notNull())
        .addColumn('name', 'text', (column) => column.notNull().check(nameLength))
        .addColumn('driver', 'text', (column) => column.notNull())
        .addColumn('options', 'text', (column) => column.notNull())
        .addColumn('created_at', 'integer', (column) => column.notNull())
        .addForeignKeyConstraint('pools_project', ['project_id'], 'projects', ['id'], (key) =>
          key.deferrable().initiallyDeferred(),
        ),
    ).execute()
    // Pools are named on every command line and in APIs, where nothing could tell two of one name apart.
    await schema.createIndex('pools_by_name').on('pools').column('name').unique().execute()

    await strict(
      schema
        .createTable('layers')
        .addColumn('alias', 'integer', (column) =>
          column
            .primaryKey()
            .autoIncrement()
            .notNull()
            .check(sql<boolean>`alias between 1 and 4294967295`),
        )
        .addColumn('id', 'text', (column) => column.notNull().unique())
        .addColumn('project_id', 'text', (column) => column.notNull())
        .addColumn('volume_id', 'text')
        .addColumn('state', 'text', (column) =>
          column.notNull().check(oneOf('state', ['making', 'spare', 'active', 'closing', 'sealed', 'condemned'])),
        )
        .addColumn('epoch', 'integer', (column) => column.notNull().check(notNegative('epoch')))
        .addColumn('created_at', 'integer', (column) => column.notNull())
        .addForeignKeyConstraint('layers_project', ['project_id'], 'projects', ['id'], (key) =>
          key.deferrable().initiallyDeferred(),
        )
        .addForeignKeyConstraint('layers_volume', ['volume_id'], 'resources', ['id'], (key) =>
          key.onDelete('set null').deferrable().initiallyDeferred(),
        ),
    ).execute()
    await schema.createIndex('layers_by_volume').on('layers').column('volume_id').execute()
    await schema.createIndex('layers_by_state').on('layers').column('state').execute()

    await strict(
      schema
        .createTable('replicas')
        .addColumn('layer_alias', 'integer', (column) => column.notNull())
        .addColumn('pool_id', 'text', (column) => column.notNull())
        .addColumn('project_id', 'text', (column) => column.notNull())
        .addColumn('state', 'text', (column) => column.notNull().check(oneOf('state', ['complete', 'filling', 'condemned'])))
        .addPrimaryKeyConstraint('replicas_key', ['layer_alias', 'pool_id'])
        .addForeignKeyConstraint('replicas_layer', ['layer_alias'], 'layers', ['alias'], (key) =>
          key.onDelete('cascade').deferrable().initiallyDeferred(),
        )
        .addForeignKeyConstraint('replicas_pool', ['pool_id'], 'pools', ['id'], (key) => key.deferrable().initiallyDeferred())
        .addForeignKeyConstraint('replicas_project', ['project_id'], 'projects', ['id'], (key) =>
          key.deferrable().initiallyDeferred(),
        ),
    ).execute()
    await schema.createIndex('replicas_by_pool').on('replicas').columns(['pool_id', 'layer_alias']).execute()

    await strict(
      schema
        .createTable('resources')
        .addColumn('id', 'text', (column) => column.primaryKey().notNull())
        .addColumn('project_id', 'text', (column) => column.notNull())
        .addColumn('kind', 'text', (column) => column.notNull().check(oneOf('kind', ['volume', 'snapshot', 'image', 'file'])))
        .addColumn('name', 'text', (column) => column.notNull().check(nameLength))
        // 512 TiB: the address space of a map.
        .addColumn('size_bytes', 'integer', (column) =>
          column.notNull().check(sql<boolean>`size_bytes between 0 and 562949953421312`),
        )
        .addColumn('root_word', 'integer', (column) => column.notNull().check(notNegative('root_word')))
        .addColumn('root_crc', 'integer', (column) => column.notNull().check(sql<boolean>`root_crc between 0 and 4294967295`))
        .addColumn('home_pool_id', 'text', (column) => column.notNull())
        .addColumn('parent_id', 'text')
        .addColumn('volume_id', 'text')
        .addColumn('status', 'text', (column) =>
          column.notNull().check(oneOf('status', ['creating', 'available', 'deleting', 'error'])),
        )
        .addColumn('created_at', 'integer', (column) => column.notNull())
        .addColumn('updated_at', 'integer', (column) => column.notNull())
        .addForeignKeyConstraint('resources_project', ['project_id'], 'projects', ['id'], (key) =>
          key.deferrable().initiallyDeferred(),
        )
        .addForeignKeyConstraint('resources_home_pool', ['home_pool_id'], 'pools', ['id'], (key) =>
          key.deferrable().initiallyDeferred(),
        )
        .addForeignKeyConstraint('resources_parent', ['parent_id'], 'resources', ['id'], (key) =>
          key.onDelete('set null').deferrable().initiallyDeferred(),
        )
        // A volume with snapshots cannot go: its snapshots would have no name.
        .addForeignKeyConstraint('resources_volume', ['volume_id'], 'resources', ['id'], (key) =>
          key.deferrable().initiallyDeferred(),
        )
        .addCheckConstraint('resources_volume_of_snapshots', sql<boolean>`(kind = 'snapshot') = (volume_id is not null)`),
    ).execute()
    await schema.createIndex('resources_by_name').on('resources').columns(['project_id', 'kind', 'name']).execute()
    await schema.createIndex('resources_by_parent').on('resources').column('parent_id').execute()
    await schema.createIndex('resources_by_volume').on('resources').columns(['volume_id', 'name']).execute()
    await schema.createIndex('resources_by_home_pool').on('resources').column('home_pool_id').execute()

    await strict(
      schema
        .createTable('volumes')
        .addColumn('id', 'text', (column) => column.primaryKey().notNull())
        .addColumn('project_id', 'text', (column) => column.notNull())
        // UNIQUE: a layer is written by one volume (I1).
        .addColumn('active_alias', 'integer', (column) => column.notNull().unique())
        .addColumn('next_alias', 'integer', (column) => column.unique())
        .addColumn('map_lsn', 'integer', (column) => column.notNull().check(notNegative('map_lsn')))
        .addColumn('epoch', 'integer', (column) => column.notNull().check(notNegative('epoch')))
        .addColumn('shared_below_page', 'integer', (column) => column.notNull().check(notNegative('shared_below_page')))
        .addColumn('throttle', 'text')
        .addForeignKeyConstraint('volumes_resource', ['id'], 'resources', ['id'], (key) =>
          key.onDelete('cascade').deferrable().initiallyDeferred(),
        )
        .addForeignKeyConstraint('volumes_project', ['project_id'], 'projects', ['id'], (key) =>
          key.deferrable().initiallyDeferred(),
        )
        .addForeignKeyConstraint('volumes_active', ['active_alias'], 'layers', ['alias'], (key) =>
          key.deferrable().initiallyDeferred(),
        )
        .addForeignKeyConstraint('volumes_next', ['next_alias'], 'layers', ['alias'], (key) =>
          key.deferrable().initiallyDeferred(),
        )
        .addCheckConstraint('volumes_next_is_another', sql<boolean>`next_alias is null or next_alias <> active_alias`),
    ).execute()

    await strict(
      schema
        .createTable('leases')
        .addColumn('volume_id', 'text', (column) => column.primaryKey().notNull())
        .addColumn('project_id', 'text', (column) => column.notNull())
        .addColumn('holder', 'text', (column) => column.notNull())
        .addColumn('epoch', 'integer', (column) => column.notNull().check(notNegative('epoch')))
        .addColumn('acquired_at', 'integer', (column) => column.notNull())
        .addColumn('released_at', 'integer')
        .addForeignKeyConstraint('leases_volume', ['volume_id'], 'resources', ['id'], (key) =>
          key.onDelete('cascade').deferrable().initiallyDeferred(),
        )
        .addForeignKeyConstraint('leases_project', ['project_id'], 'projects', ['id'], (key) =>
          key.deferrable().initiallyDeferred(),
        ),
    ).execute()

    await strict(
      schema
        .createTable('attachments')
        .addColumn('id', 'text', (column) => column.primaryKey().notNull())
        .addColumn('project_id', 'text', (column) => column.notNull())
        .addColumn('volume_id', 'text', (column) => column.notNull())
        .addColumn('protocol', 'text', (column) => column.notNull().check(oneOf('protocol', ['nbd', 'iscsi'])))
        .addColumn('read_only', 'integer', (column) => column.notNull().check(sql<boolean>`read_only in (0, 1)`))
        .addColumn('shared', 'integer', (column) => column.notNull().check(sql<boolean>`shared in (0, 1)`))
        .addColumn('options', 'text', (column) => column.notNull())
        .addColumn('created_at', 'integer', (column) => column.notNull())
        // What is attached cannot be deleted.
        .addForeignKeyConstraint('attachments_volume', ['volume_id'], 'resources', ['id'], (key) =>
          key.deferrable().initiallyDeferred(),
        )
        .addForeignKeyConstraint('attachments_project', ['project_id'], 'projects', ['id'], (key) =>
          key.deferrable().initiallyDeferred(),
        ),
    ).execute()
    await schema.createIndex('attachments_by_volume').on('attachments').column('volume_id').execute()

    await strict(
      schema
        .createTable('jobs')
        .addColumn('id', 'text', (column) => column.primaryKey().notNull())
        .addColumn('project_id', 'text', (column) => column.notNull())
        .addColumn('kind', 'text', (column) => column.notNull())
        // No reference: a job outlives what it worked on.
        .addColumn('subject', 'text', (column) => column.notNull())
        .addColumn('state', 'text', (column) =>
          column.notNull().check(oneOf('state', ['queued', 'running', 'paused', 'failed', 'cancelled', 'done'])),
        )
        .addColumn('progress_bytes', 'integer', (column) => column.notNull().check(notNegative('progress_bytes')))
        .addColumn('total_bytes', 'integer')
        .addColumn('params', 'text', (column) => column.notNull())
        .addColumn('cursor', 'text')
        .addColumn('result', 'text')
        .addColumn('error_code', 'text')
        .addColumn('error_message', 'text')
        .addColumn('created_at', 'integer', (column) => column.notNull())
        .addColumn('updated_at', 'integer', (column) => column.notNull())
        .addForeignKeyConstraint('jobs_project', ['project_id'], 'projects', ['id'], (key) =>
          key.deferrable().initiallyDeferred(),
        ),
    ).execute()
    await schema.createIndex('jobs_by_state').on('jobs').column('state').execute()
    await schema.createIndex('jobs_by_subject').on('jobs').column('subject').execute()
    await schema.createIndex('jobs_by_time').on('jobs').columns(['project_id', 'created_at']).execute()

    await strict(
      schema
        .createTable('pages')
        .addColumn('id', 'integer', (column) =>
          column
            .primaryKey()
            .notNull()
            .check(sql<boolean>`id > 0`),
        )
        .addColumn('body', 'blob', (column) => column.notNull()),
    ).execute()

    await strict(
      schema
        .createTable('page_ranges')
        .addColumn('first_page_id', 'integer', (column) => column.primaryKey().notNull())
        .addColumn('end_page_id', 'integer', (column) => column.notNull())
        .addColumn('volume_id', 'text', (column) => column.notNull())
        .addCheckConstraint('page_ranges_not_empty', sql<boolean>`end_page_id > first_page_id`),
    ).execute()
    await schema.createIndex('page_ranges_by_volume').on('page_ranges').column('volume_id').execute()
  },
}
