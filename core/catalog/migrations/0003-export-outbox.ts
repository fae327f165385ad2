/**
 * The outbox of the pools' exports: every change of a row that must survive the loss of the catalog leaves a note here, in the
 * transaction that makes it, and the exporter (mapper/exporter.ts) brings the rows that the notes name into the pools.
 *
 * `pool_id` is the pool that the row belongs to, or belonged to before a delete; null: every pool. Map pages leave no notes of
 * their own: a checkpoint notes the range of ids that it stored.
 */
import { type Kysely, sql } from 'kysely'
import type { Migration } from './index.ts'

type Event = 'insert' | 'update' | 'delete'

/** The tables of content belong to another migration, which a catalog made by it has before this one. */
async function tableExists(tx: Kysely<unknown>, name: string): Promise<boolean> {
  const { rows } = await sql`select 1 from sqlite_schema where type = 'table' and name = ${name}`.execute(tx)
  return rows.length > 0
}

async function addTrigger(
  tx: Kysely<unknown>,
  table: string,
  event: Event,
  statements: readonly string[],
  when = '',
): Promise<void> {
  const body = statements.map((statement) => `insert into export_changes (table_name, row_key, pool_id) ${statement};`).join(' ')
  await sql.raw(`create trigger export_${table}_${event} after ${event} on ${table} ${when} begin ${body} end`).execute(tx)
}

const changed = (event: Event): string => (event === 'delete' ? 'old' : 'new')
const events: readonly Event[] = ['insert', 'update', 'delete']

export const exportOutbox: Migration = {
  name: '0003-export-outbox',
  async up(tx) {
    await sql`
      create table export_changes (
        seq integer primary key autoincrement not null,
        table_name text not null,
        row_key text not null,
        pool_id text
      ) strict`.execute(tx)
    // How far the export of a pool was known to be complete, and whose pool it was before it was taken over.
    await sql`
      create table export_pools (
        pool_id text primary key not null references pools (id) on delete cascade deferrable initially deferred,
        record_number integer not null check (record_number >= 0),
        outbox_seq integer not null check (outbox_seq >= 0),
        is_ahead integer not null check (is_ahead in (0, 1)),
        taken_from text
      ) strict`.execute(tx)

    for (const event of events) {
      const row = changed(event)
      await addTrigger(tx, 'pools', event, [`values ('pools', ${row}.id, ${row}.id)`])
      await addTrigger(tx, 'projects', event, [`values ('projects', ${row}.id, null)`])
      await addTrigger(tx, 'replicas', event, [
        `values ('replicas', ${row}.layer_alias, ${row}.pool_id), ('layers', ${row}.layer_alias, ${row}.pool_id)`,
      ])
    }
    // Made and deleted, a layer is noted with its replica.
    await addTrigger(tx, 'layers', 'update', [`select 'layers', new.alias, pool_id from replicas where layer_alias = new.alias`])
    const contents = ['volumes', 'files']
    const present: string[] = []
    for (const table of contents) if (await tableExists(tx, table)) present.push(table)
    await addTrigger(tx, 'resources', 'insert', [`values ('resources', new.id, new.home_pool_id)`])
    await addTrigger(tx, 'resources', 'update', [
      `values ('resources', new.id, new.home_pool_id)`,
      // It moved: all of it leaves one pool and comes to the other.
      ...['resources', ...present].flatMap((table) => [
        `select '${table}', new.id, old.home_pool_id where old.home_pool_id <> new.home_pool_id`,
        `select '${table}', new.id, new.home_pool_id where old.home_pool_id <> new.home_pool_id`,
      ]),
    ])
    await addTrigger(tx, 'resources', 'delete', [`values ('resources', old.id, old.home_pool_id)`])
    for (const table of present) {
      for (const event of events) {
        const row = changed(event)
        // A row that goes with its resource needs no note: without the resource it means nothing.
        await addTrigger(tx, table, event, [`select '${table}', ${row}.id, home_pool_id from resources where id = ${row}.id`])
      }
    }
    if (await tableExists(tx, 'containers')) {
      for (const event of events) await addTrigger(tx, 'containers', event, [`values ('containers', ${changed(event)}.id, null)`])
    }
  },
}
