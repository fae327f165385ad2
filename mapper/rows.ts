/** Rows of the catalog that operations start from, with the errors of what is not there. */
import {
  AtollError,
  toAtollError,
  type CatalogTransaction,
  type ErrorCode,
  type LeaseRow,
  type ResourceKind,
  type ResourceRow,
  type VolumeRow,
} from '@atoll/core'

const notFoundCodes: Record<ResourceKind, ErrorCode> = {
  volume: 'VOLUME_NOT_FOUND',
  snapshot: 'SNAPSHOT_NOT_FOUND',
  image: 'IMAGE_NOT_FOUND',
  file: 'FILE_NOT_FOUND',
}
const inUseCodes: Record<ResourceKind, ErrorCode> = {
  volume: 'VOLUME_IN_USE',
  snapshot: 'SNAPSHOT_IN_USE',
  image: 'IMAGE_IN_USE',
  file: 'FILE_IN_USE',
}

/** Any resource. @throws AtollError RESOURCE_NOT_FOUND */
export async function requireResource(tx: CatalogTransaction, id: string): Promise<ResourceRow> {
  const row = await tx.selectFrom('resources').selectAll().where('id', '=', id).executeTakeFirst()
  if (row === undefined) throw new AtollError('RESOURCE_NOT_FOUND', `there is no resource ${id}`, { values: { id } })
  return row
}

/** A resource of one kind. @throws AtollError VOLUME_NOT_FOUND, SNAPSHOT_NOT_FOUND, IMAGE_NOT_FOUND */
export async function requireKind(tx: CatalogTransaction, id: string, kind: ResourceKind): Promise<ResourceRow> {
  const row = await tx.selectFrom('resources').selectAll().where('id', '=', id).where('kind', '=', kind).executeTakeFirst()
  if (row === undefined) throw new AtollError(notFoundCodes[kind], `there is no ${kind} ${id}`, { values: { id } })
  return row
}

/** The row of what is written like a volume. @throws AtollError VOLUME_NOT_FOUND */
export async function requireVolumeRow(tx: CatalogTransaction, id: string): Promise<VolumeRow> {
  const row = await findVolumeRow(tx, id)
  if (row === undefined) throw new AtollError('VOLUME_NOT_FOUND', `there is no volume ${id}`, { values: { id } })
  return row
}

/** What a resource writes, if it writes anything. */
export async function findVolumeRow(tx: CatalogTransaction, id: string): Promise<VolumeRow | undefined> {
  return await tx.selectFrom('volumes').selectAll().where('id', '=', id).executeTakeFirst()
}

/** The lease of a volume, if it was ever open. */
export async function findLease(tx: CatalogTransaction, volumeId: string): Promise<LeaseRow | undefined> {
  return await tx.selectFrom('leases').selectAll().where('volume_id', '=', volumeId).executeTakeFirst()
}

/** @throws AtollError RESOURCE_STATUS unless the resource can be used */
export function requireAvailable(row: ResourceRow): void {
  if (row.status === 'available') return
  throw new AtollError('RESOURCE_STATUS', `${row.kind} ${row.id} (${row.name}) is ${row.status}, so it cannot be used for this`, {
    values: { id: row.id, status: row.status },
  })
}

/** The error of an operation that needs the resource closed. */
export function inUseError(row: ResourceRow, why: string): AtollError {
  return new AtollError(inUseCodes[row.kind], `${row.kind} ${row.id} (${row.name}) is open: ${why}`, {
    values: { id: row.id, name: row.name },
  })
}

/** The error of an owner whose epoch is not the catalog's any more (I1). */
export function leaseLostError(volumeId: string, epoch: number): AtollError {
  return new AtollError('LEASE_LOST', `the lease of ${volumeId} with epoch ${epoch} was taken over: nothing was changed`, {
    values: { id: volumeId, epoch },
  })
}

/** The same error with the resource that it is about in front; the code stays. One that has a resource already is left alone. */
export function aboutResource(error: unknown, resourceId: string, what: string): AtollError {
  const known = toAtollError(error)
  if (known.values['resourceId'] !== undefined) return known
  return new AtollError(known.code, `${resourceId}: ${what}: ${known.message}`, {
    values: { ...known.values, resourceId },
    cause: known,
    retryable: known.retryable,
  })
}
