/**
 * The metadata contexts of an export, by name.
 *
 * - `base:allocation`: what reads as zeros.
 * - `qemu:allocation-depth`: what the volume has written itself (1), and what it shares with others (2).
 * - `qemu:dirty-bitmap:NAME`: what changed since the state of that name, a snapshot of the volume.
 *
 * Names of snapshots are not unique; one that is shared by several is not offered, their ids are.
 */
import type { NbdMetaContext } from '@atoll/native'
import type { NbdExport } from './export-table.ts'
import { stringBytesMax } from './protocol.ts'

/** Contexts of one connection. Each of a bitmap keeps a map in memory (I8). */
export const selectedContextsMax = 32

const allocationName = 'base:allocation'
const depthName = 'qemu:allocation-depth'
const bitmapPrefix = 'qemu:dirty-bitmap:'

/** A context that a client has selected. */
export interface SelectedContext {
  readonly name: string
  readonly context: NbdMetaContext
}

/** Every name that `selectContexts` would take, or those that a query asks for: a full name, `base:`, `qemu:`, `qemu:dirty-bitmap:`. */
export async function listContexts(entry: NbdExport, queries: readonly string[]): Promise<string[]> {
  const names = [allocationName, depthName]
  const wantsBitmaps = queries.length === 0 || queries.some((query) => query === 'qemu:' || query.startsWith(bitmapPrefix))
  if (wantsBitmaps && entry.changes !== undefined) {
    for (const name of await entry.changes.list()) names.push(`${bitmapPrefix}${name}`)
  }
  const isAsked = (name: string): boolean =>
    queries.some((query) => query === name || (wildcards.includes(query) && name.startsWith(query)))
  return names.filter((name) => (queries.length === 0 || isAsked(name)) && Buffer.byteLength(name) <= stringBytesMax)
}

const wildcards: readonly string[] = ['base:', 'qemu:', bitmapPrefix]

/**
 * Selects by full name; what is not known is left out, and nothing is selected twice. Null: more than may be selected.
 * Ids are given in order, from 1 on.
 * @throws what the export's `changes` throw
 */
export async function selectContexts(entry: NbdExport, queries: readonly string[]): Promise<SelectedContext[] | null> {
  const selected: SelectedContext[] = []
  for (const name of new Set(queries)) {
    const context = await openContext(entry, name, selected.length + 1)
    if (context === null) continue
    if (selected.length === selectedContextsMax) return null
    selected.push({ name, context })
  }
  return selected
}

async function openContext(entry: NbdExport, name: string, id: number): Promise<NbdMetaContext | null> {
  if (name === allocationName) return { id, kind: 'allocation' }
  if (name === depthName) return { id, kind: 'depth' }
  if (!name.startsWith(bitmapPrefix) || name === bitmapPrefix) return null
  const base = (await entry.changes?.open(name.slice(bitmapPrefix.length))) ?? null
  return base === null ? null : { id, kind: 'changed-since', base }
}
