import type { PageDocument } from '../admin-types.ts'
import type { AdminClient, Query } from './admin-client.ts'

/** Entries asked for at a time. */
const pageLimit = 500

/** All of a listing, page by page, so that no request is large. @throws CliError */
export async function allPages<Entry>(client: AdminClient, path: string, query: Query): Promise<Entry[]> {
  const entries: Entry[] = []
  for (let marker: string | undefined; ;) {
    const page: PageDocument<Entry> = await client.get(path, { ...query, marker, limit: pageLimit })
    entries.push(...page.entries)
    if (page.next === null) return entries
    marker = page.next
  }
}
