/**
 * Lists what is in a container, as Swift does: names in the order of their bytes, from a marker on, those that share a prefix
 * up to a delimiter as one. A listing is read in pieces by key, so its cost is what it shows, wherever in the container that
 * is, and the event loop has turns in between.
 */
import { setImmediate as nextTurn } from 'node:timers/promises'
import { AtollError, currentFile, type Catalog, type CatalogTransaction } from '@atoll/core'
import { selectFiles, type FoundFile } from './file-rows.ts'

/** Entries that one call returns. */
export const listingLimitMax = 10_000
/** Rows read in one turn of the event loop. */
const rowsPerTurn = 500
/** Rows read where the next one may lead to a jump over all that share a prefix; more and more while none does. */
const rowsAfterJump = 2
/** Common prefixes looked for in one turn: each costs a query. */
const prefixesPerTurn = 100
const delimiterBytesMax = 1024

export interface ListingOptions {
  /** Only names that begin so. */
  prefix?: string
  /** What follows the prefix is shown up to this text, once for all names that share it. */
  delimiter?: string
  /** Only what comes after this name (or common prefix) in the order. */
  marker?: string
  /** Only what comes before this name. */
  endMarker?: string
  /** 1 to 10000, default 10000. */
  limit?: number
  /** Default false: what names mean now. True: every version and every delete marker, the newest of a name first. */
  versions?: boolean
  /** With `versions`: id of the version of `marker` after which it goes on. */
  versionMarker?: string
}

/** A file, or what several names have in common. */
export type ListingEntry = { readonly file: FoundFile } | { readonly commonPrefix: string }

export interface Listing {
  readonly entries: ListingEntry[]
  /** Where another listing goes on; null: this is the end. */
  readonly next: { readonly marker: string; readonly versionMarker: string | null } | null
}

/** Where a listing is: behind a name, behind a version of a name, or at a name. */
interface Position {
  readonly name: string
  readonly inclusive: boolean
  /** Versions of `name` that were made before this moment are still to come. */
  readonly versionsBefore: number | null
}

/** @throws AtollError ARGUMENT_INVALID, FILE_NOT_FOUND for a version marker that is none */
export async function listFiles(catalog: Catalog, containerId: string, options: ListingOptions): Promise<Listing> {
  const limit = options.limit ?? listingLimitMax
  if (!Number.isSafeInteger(limit) || limit < 1 || limit > listingLimitMax) {
    throw new AtollError(
      'ARGUMENT_INVALID',
      `a limit of ${limit} is out of range: 1 to ${listingLimitMax} entries are possible`,
      {
        values: { limit },
      },
    )
  }
  const { prefix = '', delimiter = '', marker = '', versions = false } = options
  for (const [argument, text] of Object.entries({ prefix, delimiter, marker, 'end marker': options.endMarker ?? '' })) {
    if (Buffer.byteLength(text) <= delimiterBytesMax && text.isWellFormed() && !text.includes('\0')) continue
    throw new AtollError('ARGUMENT_INVALID', `the ${argument} is no part of a name: at most 1024 bytes of UTF-8 without NUL`, {
      values: { argument },
    })
  }
  const endName = smaller(options.endMarker === '' ? undefined : options.endMarker, prefix === '' ? null : afterPrefix(prefix))
  const entries: ListingEntry[] = []
  let position = await startOf(catalog.db, containerId, options)
  let queries = 0
  let rowCountMax = delimiter === '' ? rowsPerTurn : rowsAfterJump
  for (;;) {
    const count = Math.min(limit + 1 - entries.length, rowCountMax)
    const rows = await rowsFrom(catalog.db, containerId, { position, endName, versions, count })
    let jumped = false
    for (const file of rows) {
      const commonPrefix = commonPrefixOf(file.name, prefix, delimiter)
      if (commonPrefix === null) {
        entries.push({ file })
        position = { name: file.name, inclusive: false, versionsBefore: versions ? file.created_at : null }
      } else {
        // Who pages by what was shown last comes back with it as the marker.
        if (commonPrefix !== marker) entries.push({ commonPrefix })
        const after = afterPrefix(commonPrefix)
        if (after === null) return finish(entries, limit)
        position = { name: after, inclusive: true, versionsBefore: null }
        jumped = true
      }
      if (entries.length > limit) return finish(entries, limit)
      if (jumped) break
    }
    if (!jumped && rows.length < count) return finish(entries, limit)
    rowCountMax = jumped ? rowsAfterJump : Math.min(rowCountMax * 2, rowsPerTurn)
    queries += 1
    if (rows.length === rowsPerTurn || queries % prefixesPerTurn === 0) await nextTurn()
  }
}

function finish(entries: ListingEntry[], limit: number): Listing {
  if (entries.length <= limit) return { entries, next: null }
  const shown = entries.slice(0, limit)
  const last = shown.at(-1)
  if (last === undefined) return { entries: shown, next: null }
  return {
    entries: shown,
    next:
      'file' in last
        ? { marker: last.file.name, versionMarker: last.file.id }
        : { marker: last.commonPrefix, versionMarker: null },
  }
}

async function startOf(tx: CatalogTransaction, containerId: string, options: ListingOptions): Promise<Position> {
  const { prefix = '', marker = '', versions = false, versionMarker } = options
  if (versions && versionMarker !== undefined) {
    const version = await tx
      .selectFrom('files')
      .select(['name', 'created_at'])
      .where('id', '=', versionMarker)
      .where('container_id', '=', containerId)
      .executeTakeFirst()
    // One that was deleted meanwhile: the other versions of its name are shown again rather than left out.
    if (version === undefined || version.name !== marker) return { name: marker, inclusive: true, versionsBefore: null }
    return { name: marker, inclusive: false, versionsBefore: version.created_at }
  }
  // Nothing has the name "", so being behind it is the start.
  const behindMarker = { name: marker, inclusive: false, versionsBefore: null }
  return comparesBefore(marker, prefix) ? { name: prefix, inclusive: true, versionsBefore: null } : behindMarker
}

interface RowQuery {
  readonly position: Position
  readonly endName: string | null
  readonly versions: boolean
  readonly count: number
}

async function rowsFrom(tx: CatalogTransaction, containerId: string, wanted: RowQuery): Promise<FoundFile[]> {
  const { position, endName, versions, count } = wanted
  const rows: FoundFile[] = []
  if (position.versionsBefore !== null) {
    rows.push(
      ...(await selectFiles(tx)
        .where('files.container_id', '=', containerId)
        .where('files.name', '=', position.name)
        .where('files.created_at', '<', position.versionsBefore)
        .orderBy('files.created_at', 'desc')
        .limit(count)
        .execute()),
    )
    if (rows.length === count) return rows
  }
  let query = selectFiles(tx)
    .where('files.container_id', '=', containerId)
    .where('files.name', position.inclusive ? '>=' : '>', position.name)
    .orderBy('files.name')
    .limit(count - rows.length)
  if (endName !== null) query = query.where('files.name', '<', endName)
  query = versions ? query.orderBy('files.created_at', 'desc') : query.where(currentFile)
  rows.push(...(await query.execute()))
  return rows
}

/** The part of a name that is shown for all that share it; null: the name itself is shown. */
function commonPrefixOf(name: string, prefix: string, delimiter: string): string | null {
  if (delimiter === '') return null
  const at = name.indexOf(delimiter, prefix.length)
  return at < 0 ? null : name.slice(0, at + delimiter.length)
}

/**
 * The first text in the order of bytes (which is that of code points) that is greater than all that begin with `prefix`; null
 * if there is none.
 */
export function afterPrefix(prefix: string): string | null {
  const points = Array.from(prefix, (character) => character.codePointAt(0) ?? 0)
  while (points.length > 0) {
    const last = points.pop() ?? 0
    if (last === 0x10_ffff) continue
    // No text has a half of a surrogate pair.
    return String.fromCodePoint(...points, last === 0xd7ff ? 0xe000 : last + 1)
  }
  return null
}

function smaller(a: string | undefined, b: string | null): string | null {
  if (a === undefined) return b
  return b === null || comparesBefore(a, b) ? a : b
}

/** Whether `a` comes before `b` in the order of their bytes. */
function comparesBefore(a: string, b: string): boolean {
  return Buffer.compare(Buffer.from(a), Buffer.from(b)) < 0
}
