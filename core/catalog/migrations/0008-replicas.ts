/**
 * A layer may have replicas in several pools, and a resource may change its home.
 *
 * - `replicas.is_primary`: the one that is read where there is no closer one; at most one of a layer. What was there before has one.
 * - `replicas.filling_job`: the job that writes into the replica; null: nobody does.
 * - `replicas.is_copy`: it was filled from another replica, so that it holds no more than had to be copied, and no journal.
 * - `resources.home_epoch`: rises with every change of the home, so that of two exports that have the resource the newer one is known.
 */
import { type Kysely, sql } from 'kysely'
import type { Migration } from './index.ts'

export const addReplicas: Migration = {
  name: '0008-replicas',
  async up(tx: Kysely<unknown>) {
    await sql`alter table replicas add column is_primary integer not null default 1 check (is_primary in (0, 1))`.execute(tx)
    await sql`alter table replicas add column filling_job text`.execute(tx)
    await sql`alter table replicas add column is_copy integer not null default 0 check (is_copy in (0, 1))`.execute(tx)
    await sql
      .raw(
        `create trigger replicas_copied after insert on replicas when new.state = 'filling' begin
          update replicas set is_copy = 1 where layer_alias = new.layer_alias and pool_id = new.pool_id; end`,
      )
      .execute(tx)
    await sql`create unique index replicas_primary on replicas (layer_alias) where is_primary = 1`.execute(tx)
    await sql`alter table resources add column home_epoch integer not null default 0 check (home_epoch >= 0)`.execute(tx)
  },
}
