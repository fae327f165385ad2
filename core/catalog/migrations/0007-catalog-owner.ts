/**
 * Several daemons may share a catalog, of which one is active: who that is, and what of a volume belongs to one of their homes.
 *
 * - `catalog_owner`: one row, see catalog-owner.ts.
 * - `leases.log_id`: the batch logs under which the volume was opened last (null: an Atoll that had one home only), and
 *   `leases.log_since_epoch`: the first epoch from which on no other logs were used. Older entries in them mean nothing.
 * - `attachments.home`: the home whose sockets the attachment names; null: an Atoll that had one home only; empty: the one in which the
 *   catalog lies.
 */
import { type Kysely, sql } from 'kysely'
import type { Migration } from './index.ts'

export const addCatalogOwner: Migration = {
  name: '0007-catalog-owner',
  async up(tx: Kysely<unknown>) {
    await sql`
      create table catalog_owner (
        id integer primary key not null check (id = 1),
        epoch integer not null check (epoch >= 0),
        holder text not null
      ) strict`.execute(tx)
    await sql`insert into catalog_owner values (1, 0, '')`.execute(tx)
    await sql`alter table leases add column log_id text`.execute(tx)
    await sql`alter table leases add column log_since_epoch integer not null default 0`.execute(tx)
    await sql`alter table attachments add column home text`.execute(tx)
  },
}
