/**
 * How many files a container has and how many bytes, kept by triggers in the transactions that change them, so that nobody who
 * asks has to count and no crash leaves them wrong.
 *
 * Sizes are added up in two halves, because files are thin and a sum of them can pass what an integer holds. Deleting the
 * resource of a file deletes its row first: what goes by a foreign key goes when its size is not known any more.
 */
import { type Kysely, sql } from 'kysely'
import type { Migration } from './index.ts'

const sizeOf = (row: string): string => `coalesce((select size_bytes from resources where id = ${row}.id), 0)`

/** Adds (`+`) or takes away (`-`) a row of `files` if it is what its name means. */
const count = (sign: '+' | '-', row: string): string => `
  update container_counts set
    file_count = file_count ${sign} 1,
    size_high = size_high ${sign} (${sizeOf(row)} >> 32),
    size_low = size_low ${sign} (${sizeOf(row)} & 4294967295)
  where container_id = ${row}.container_id and ${row}.is_current = 1;`

export const countContainers: Migration = {
  name: '0006-container-counts',
  async up(tx: Kysely<unknown>) {
    await sql`
      create table container_counts (
        container_id text primary key not null references containers (id) on delete cascade deferrable initially deferred,
        file_count integer not null,
        size_high integer not null,
        size_low integer not null
      ) strict, without rowid`.execute(tx)
    await sql`
      insert into container_counts
      select c.id, count(r.id), coalesce(sum(r.size_bytes >> 32), 0), coalesce(sum(r.size_bytes & 4294967295), 0)
      from containers as c
      left join files as f on f.container_id = c.id and f.is_current = 1
      left join resources as r on r.id = f.id
      group by c.id`.execute(tx)
    const resize = (before: string, after: string): string => `
      update container_counts set
        size_high = size_high + (${after} >> 32) - (${before} >> 32),
        size_low = size_low + (${after} & 4294967295) - (${before} & 4294967295)
      where container_id = (select container_id from files where id = new.id and is_current = 1);`
    const triggers = {
      'container_counts_begin after insert on containers': 'insert into container_counts values (new.id, 0, 0, 0);',
      'container_counts_insert after insert on files': count('+', 'new'),
      'container_counts_update after update of is_current, container_id on files': count('-', 'old') + count('+', 'new'),
      'container_counts_delete after delete on files': count('-', 'old'),
      // A file and its resource come in either order.
      "container_counts_resource after insert on resources when new.kind = 'file'": resize('0', 'new.size_bytes'),
      "container_counts_resize after update of size_bytes on resources when new.kind = 'file'": resize(
        'old.size_bytes',
        'new.size_bytes',
      ),
      "container_counts_remove before delete on resources when old.kind = 'file'": 'delete from files where id = old.id;',
    }
    for (const [event, body] of Object.entries(triggers)) await sql.raw(`create trigger ${event} begin ${body} end`).execute(tx)
  },
}
