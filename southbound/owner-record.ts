/**
 * The owner record of a pool: which catalog knows what its layers are for (I11).
 *
 * A pool belongs to one catalog. Another one that opened it would take every layer for unknown, and its reclaim would have no
 * reason to keep any of them. The epoch is raised each time the owner opens the pool, so that whoever still holds an older one
 * can tell that it was left behind. The record is JSON: {version: 1, catalogId, epoch, since}; `catalogId` null means that
 * nobody owns the pool (it was deleted).
 */
import { AtollError, isId } from '@atoll/core'
import type { Store } from '@atoll/native'
import { z } from 'zod'

const recordName = 'owner'
const recordVersion = 1

const recordSchema = z.strictObject({
  version: z.literal(recordVersion),
  catalogId: z.string().refine(isId).nullable(),
  epoch: z.int().min(0),
  /** When this epoch began, ISO 8601. */
  since: z.iso.datetime(),
})

export type OwnerRecord = z.infer<typeof recordSchema>

/**
 * Reads the record, null if there is none.
 * @throws AtollError FORMAT_VERSION of a newer version, POOL_CORRUPT if it cannot be understood
 */
export async function readOwnerRecord(store: Store, poolName: string): Promise<OwnerRecord | null> {
  const bytes = await store.readRecord(recordName)
  if (bytes === null) return null
  let content: unknown
  try {
    content = JSON.parse(new TextDecoder('utf-8', { fatal: true }).decode(bytes))
  } catch (error) {
    throw unreadable(poolName, error)
  }
  const { version } = (content ?? {}) as { version?: unknown }
  if (typeof version === 'number' && version > recordVersion) {
    throw new AtollError(
      'FORMAT_VERSION',
      `the owner record of ${poolName} has version ${version}, this build knows ${recordVersion}: use the version of Atoll that wrote it`,
      { values: { pool: poolName, foundVersion: version, knownVersion: recordVersion } },
    )
  }
  const checked = recordSchema.safeParse(content)
  if (!checked.success) throw unreadable(poolName, checked.error)
  return checked.data
}

function unreadable(poolName: string, cause: unknown): AtollError {
  return new AtollError(
    'POOL_CORRUPT',
    `the owner record of ${poolName} cannot be read, so nobody knows which catalog it belongs to: restore the record "${recordName}"`,
    { values: { pool: poolName, record: recordName }, cause },
  )
}

/**
 * The record of a pool that this catalog may have. Without the pool's lock it may change at once.
 * @throws AtollError POOL_OWNED_BY_OTHER naming the other catalog
 */
export async function requireOwnable(
  store: Store,
  poolName: string,
  catalogId: string,
  takeOverFrom?: string,
): Promise<OwnerRecord | null> {
  const found = await readOwnerRecord(store, poolName)
  const mayOwn: (string | null | undefined)[] = [null, undefined, catalogId, takeOverFrom]
  if (found !== null && !mayOwn.includes(found.catalogId)) {
    throw new AtollError(
      'POOL_OWNED_BY_OTHER',
      `${poolName} belongs to the catalog ${found.catalogId} (since ${found.since}), not to this one (${catalogId}): open it there; if that catalog is lost, bring its content back with \`atoll pool import\``,
      { values: { pool: poolName, ownerCatalogId: found.catalogId, catalogId, since: found.since } },
    )
  }
  return found
}

/**
 * Makes the pool this catalog's, or refuses. The caller holds the pool's lock.
 * @throws AtollError POOL_OWNED_BY_OTHER naming the other catalog
 */
export async function takeOwnership(
  store: Store,
  poolName: string,
  catalogId: string,
  nowMs: number,
  takeOverFrom?: string,
): Promise<OwnerRecord> {
  const found = await requireOwnable(store, poolName, catalogId, takeOverFrom)
  return writeOwnerRecord(store, { catalogId, epoch: (found?.epoch ?? 0) + 1, nowMs })
}

/** Gives the pool up: any catalog may take it. The epoch stays, so that it never goes back. */
export async function giveUpOwnership(store: Store, held: OwnerRecord, nowMs: number): Promise<void> {
  await writeOwnerRecord(store, { catalogId: null, epoch: held.epoch, nowMs })
}

async function writeOwnerRecord(
  store: Store,
  { catalogId, epoch, nowMs }: { catalogId: string | null; epoch: number; nowMs: number },
): Promise<OwnerRecord> {
  const record: OwnerRecord = { version: recordVersion, catalogId, epoch, since: new Date(nowMs).toISOString() }
  await store.writeRecord(recordName, new TextEncoder().encode(JSON.stringify(record)))
  return record
}
