/**
 * Volumes, snapshots and images in the order in which they were made, page by page along an index: what a page costs does not
 * depend on how many there are. What is made or deleted between two pages changes nothing about the others.
 */
import { setImmediate as nextTurn } from 'node:timers/promises'
import { AtollError, type Catalog, type ResourceRow } from '@atoll/core'

/** Entries of one page: some milliseconds. */
export const pageLimitMax = 1000

export interface PageOptions {
  /** 1 to 1000, default 1000. */
  limit?: number
  /** `next` of the page before; default: from the first on. */
  marker?: string
}

export interface Page<Entry> {
  entries: Entry[]
  /** The marker of the next page; null: this is the last. */
  next: string | null
}

type Age = Pick<ResourceRow, 'created_at' | 'id'>

/** The volumes or images of a project, or the snapshots of a volume. @throws AtollError ARGUMENT_INVALID */
export async function pageOfResources(
  catalog: Catalog,
  of: { kind: 'volume' | 'image'; projectId: string } | { kind: 'snapshot'; volumeId: string },
  options: PageOptions,
): Promise<Page<ResourceRow>> {
  const { limit = pageLimitMax } = options
  if (!Number.isSafeInteger(limit) || limit < 1 || limit > pageLimitMax) {
    throw new AtollError('ARGUMENT_INVALID', `a limit of ${limit} is out of range: 1 to ${pageLimitMax} entries are possible`, {
      values: { limit },
    })
  }
  const all = catalog.db.selectFrom('resources').selectAll().where('kind', '=', of.kind)
  const wanted = 'volumeId' in of ? all.where('volume_id', '=', of.volumeId) : all.where('project_id', '=', of.projectId)
  const after = options.marker === undefined ? null : parseMarker(options.marker)
  const behind =
    after === null
      ? wanted
      : wanted.where(({ eb, refTuple, tuple }) => eb(refTuple('created_at', 'id'), '>', tuple(after.created_at, after.id)))
  const rows = await behind
    .orderBy('created_at')
    .orderBy('id')
    .limit(limit + 1)
    .execute()
  const entries = rows.slice(0, limit)
  const last = entries.at(-1)
  return { entries, next: rows.length > limit && last !== undefined ? `${last.created_at}.${last.id}` : null }
}

function parseMarker(marker: string): Age {
  const [, createdAt, id] = /^(\d{1,16})\.([0-9a-f-]{36})$/.exec(marker) ?? []
  if (createdAt !== undefined && id !== undefined) return { created_at: Number(createdAt), id }
  throw new AtollError('ARGUMENT_INVALID', `${JSON.stringify(marker)} is no marker of a page`, { values: { marker } })
}

/** Names of the snapshots of some volumes, oldest first, read in pieces. */
export async function snapshotNames(catalog: Catalog, volumeIds: readonly string[]): Promise<ReadonlyMap<string, string[]>> {
  const names = new Map(volumeIds.map((id): [string, string[]] => [id, []]))
  const snapshots = catalog.db
    .selectFrom('resources')
    .select(['volume_id', 'created_at', 'id', 'name'])
    .where('kind', '=', 'snapshot')
    .where('volume_id', 'in', volumeIds)
    .orderBy('volume_id')
    .orderBy('created_at')
    .orderBy('id')
    .limit(pageLimitMax)
  for (let piece = volumeIds.length === 0 ? [] : await snapshots.execute(); ;) {
    for (const { volume_id: volumeId, name } of piece) names.get(volumeId ?? '')?.push(name)
    const last = piece.at(-1)
    if (last === undefined || piece.length < pageLimitMax) return names
    await nextTurn()
    piece = await snapshots
      .where(({ eb, refTuple, tuple }) =>
        eb(refTuple('volume_id', 'created_at', 'id'), '>', tuple(last.volume_id ?? '', last.created_at, last.id)),
      )
      .execute()
  }
}
