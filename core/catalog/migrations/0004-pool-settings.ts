/** What the operator decides about a pool after it was made. */
import { sql } from 'kysely'
import type { Migration } from './index.ts'

export const addPoolSettings: Migration = {
  name: '0004-pool-settings',
  async up(tx) {
    await sql`alter table pools add column settings text not null default '{}'`.execute(tx)
  },
}
