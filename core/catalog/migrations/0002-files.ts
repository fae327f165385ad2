/** Containers and the files in them. */
import { type CreateTableBuilder, sql } from 'kysely'
import type { Migration } from './index.ts'

/** Tables are STRICT: a text in an integer column is refused rather than kept. */
const strict = <Name extends string, Columns extends string>(table: CreateTableBuilder<Name, Columns>) =>
  table.modifyEnd(sql`strict`)

const isFlag = (column: string) => sql<boolean>`${sql.ref(column)} in (0, 1)`
/** Names are bytes of UTF-8 here, as in Swift. */
const nameBytes = (bytesMax: number) => sql<boolean>`length(cast(name as blob)) between 1 and ${sql.lit(bytesMax)}`

export const createFiles: Migration = {
  name: '0002-files',
  async up(tx) {
    const { schema } = tx
    await strict(
      schema
        .createTable('containers')
        .addColumn('id', 'text', (column) => column.primaryKey().notNull())
        .addColumn('project_id', 'text', (column) => column.notNull())
        .addColumn('name', 'text', (column) => column.notNull().check(nameBytes(256)))
        .addColumn('versioned', 'integer', (column) => column.notNull().check(isFlag('versioned')))
        .addColumn('metadata', 'text', (column) => column.notNull())
        .addColumn('created_at', 'integer', (column) => column.notNull())
        .addColumn('updated_at', 'integer', (column) => column.notNull())
        .addForeignKeyConstraint('containers_project', ['project_id'], 'projects', ['id'], (key) =>
          key.deferrable().initiallyDeferred(),
        ),
    ).execute()
    await schema.createIndex('containers_by_name').on('containers').columns(['project_id', 'name']).unique().execute()

    await strict(
      schema
        .createTable('files')
        .addColumn('id', 'text', (column) => column.primaryKey().notNull())
        .addColumn('project_id', 'text', (column) => column.notNull())
        .addColumn('container_id', 'text', (column) => column.notNull())
        .addColumn('name', 'text', (column) => column.notNull().check(nameBytes(1024)))
        .addColumn('is_current', 'integer', (column) => column.notNull().check(isFlag('is_current')))
        .addColumn('versioned', 'integer', (column) => column.notNull().check(isFlag('versioned')))
        .addColumn('delete_marker', 'integer', (column) => column.notNull().check(isFlag('delete_marker')))
        .addColumn('etag', 'text', (column) => column.check(sql<boolean>`etag is null or length(etag) = 32`))
        .addColumn('content_type', 'text', (column) => column.notNull())
        .addColumn('metadata', 'text', (column) => column.notNull())
        .addColumn('created_at', 'integer', (column) => column.notNull())
        .addForeignKeyConstraint('files_resource', ['id'], 'resources', ['id'], (key) =>
          key.onDelete('cascade').deferrable().initiallyDeferred(),
        )
        .addForeignKeyConstraint('files_project', ['project_id'], 'projects', ['id'], (key) =>
          key.deferrable().initiallyDeferred(),
        )
        // A container with files cannot go: its files would have no name.
        .addForeignKeyConstraint('files_container', ['container_id'], 'containers', ['id'], (key) =>
          key.deferrable().initiallyDeferred(),
        )
        .addCheckConstraint('files_marker_is_not_current', sql<boolean>`not (is_current and delete_marker)`),
    ).execute()
    // Listings walk along this one. Text compares by its bytes, which is the order of code points.
    await schema
      .createIndex('files_current')
      .on('files')
      .columns(['container_id', 'name'])
      .unique()
      .where(sql.ref('is_current'), '=', sql.lit(1))
      .execute()
    await schema.createIndex('files_versions').on('files').columns(['container_id', 'name', 'created_at']).execute()
  },
}
