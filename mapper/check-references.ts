/**
 * Rows against rows: what the database cannot say by itself. All of them are of one state of the catalog, so nothing that is
 * changed meanwhile looks wrong; what is mended is looked at again in the transaction that mends it.
 */
import { checkVolumeSize, type LayerRow, type LayerState, type LeaseRow, type ResourceRow, type VolumeRow } from '@atoll/core'
import type { CheckContext } from './check-finding.ts'
import { readWaiting } from './import-waiting.ts'
import { eachInTurns, mapInTurns } from './turns.ts'

/** Tables whose dangling rows are told, and mended, here and in check-layers.ts rather than by their foreign key. */
export const ownTables: ReadonlySet<string> = new Set(['leases', 'attachments', 'replicas'])

export async function checkReferences(check: CheckContext): Promise<void> {
  const { volumes: waiting } = await readWaiting(check.mapper.catalog.db)
  const isWaiting = new Set(waiting.map((volume) => volume.row['id']))
  for (const row of check.state.resources.filter((resource) => isWaiting.has(resource.id))) {
    const message = `volume "${row.name}" is being moved, and writes into a pool of the lost catalog that is not here: import that pool, then it can be opened`
    check.add({ severity: 'warning', kind: 'volume-waiting', object: row.id, message })
  }
  await eachInTurns(check.state.resources, (row) => {
    if (!isWaiting.has(row.id)) checkResource(check, row)
  })
  const nextOf = await mapInTurns(check.state.volumes, (row) => row.next_alias)
  await eachInTurns(check.state.volumes, (row) => checkVolume(check, row, nextOf))
  await checkLayerRows(check)
  await eachInTurns(check.state.leases, (row) => checkLease(check, row))
  await checkAttachments(check)
  await checkPageRanges(check)
}

function checkResource({ state, add }: CheckContext, row: ResourceRow): void {
  const isWritten = state.volumesById.has(row.id)
  const wantsRow = row.kind === 'volume' || (row.kind !== 'snapshot' && row.status === 'creating')
  if (wantsRow && !isWritten) {
    const message = `${row.kind} "${row.name}" has no row that says which layer it writes: it cannot be opened; roll it back, or bring the catalog back from a backup`
    add({ severity: 'error', kind: 'volume-row-missing', object: row.id, message })
  }
  if (!wantsRow && isWritten) {
    const message = `${row.kind} "${row.name}" never changes, but has a layer to write to: bring the catalog back from a backup`
    add({ severity: 'error', kind: 'volume-row-extra', object: row.id, message })
  }
  if (row.kind !== 'volume') return
  try {
    checkVolumeSize(row.size_bytes)
  } catch {
    const message = `volume "${row.name}" has ${row.size_bytes} bytes, which is no size of a volume: resize it to a multiple of 4096`
    add({ severity: 'error', kind: 'size-invalid', object: row.id, message })
  }
}

function checkVolume(check: CheckContext, volume: VolumeRow, nextOf: ReadonlyMap<number | null, VolumeRow>): void {
  const { state, add } = check
  checkRole(check, volume, volume.active_alias, 'active')
  if (volume.next_alias !== null) checkRole(check, volume, volume.next_alias, 'spare')
  const other = nextOf.get(volume.active_alias)
  if (other !== undefined) {
    const layerId = state.layersByAlias.get(volume.active_alias)?.id ?? String(volume.active_alias)
    const message = `layer ${layerId} is written by ${volume.id} and is to be the next one of ${other.id}: do not attach ${other.id}, and bring the catalog back from a backup`
    add({ severity: 'error', kind: 'layer-shared', object: layerId, message })
  }
}

/** The layer that a volume names is there, is the volume's, and is in the state that its place wants. */
function checkRole({ state, add }: CheckContext, volume: VolumeRow, alias: number, wanted: LayerState): void {
  const layer = state.layersByAlias.get(alias)
  // Without a row its foreign key is dangling, which the database tells.
  if (layer === undefined) return
  const place = wanted === 'active' ? 'writes' : 'is to write next'
  if (layer.state !== wanted || layer.volume_id !== volume.id) {
    const owner = layer.volume_id === volume.id ? '' : ` of ${layer.volume_id ?? 'nobody'}`
    const message = `layer ${layer.id}, which ${volume.id} ${place}, is recorded as ${layer.state}${owner}: bring the catalog back from a backup`
    add({ severity: 'error', kind: 'layer-state-wrong', object: layer.id, message })
  }
  if (layer.epoch > volume.epoch) {
    const message = `layer ${layer.id} was given to ${volume.id} under epoch ${layer.epoch}, but the volume is at ${volume.epoch}: bring the catalog back from a backup`
    add({ severity: 'error', kind: 'epoch-behind', object: volume.id, message })
  }
}

async function checkLayerRows({ state, add }: CheckContext): Promise<void> {
  const active = await mapInTurns(state.volumes, (volume) => volume.active_alias)
  await eachInTurns(state.layers, (layer) => {
    if (layer.state !== 'condemned' && (state.homes.get(layer.alias)?.length ?? 0) === 0) {
      const message = `the ${layer.state} layer ${layer.id} lies complete in no pool: bring the catalog back from a backup`
      add({ severity: 'error', kind: 'replica-missing', object: layer.id, message })
    }
    if (layer.state === 'active' && !active.has(layer.alias)) {
      const message = `layer ${layer.id} is recorded as written, but no volume names it${whose(layer)}: it is kept; delete the volume if it is not needed`
      add({ severity: 'warning', kind: 'layer-of-nobody', object: layer.id, message })
    }
  })
}

function whose(layer: LayerRow): string {
  return layer.volume_id === null ? '' : ` (it was of ${layer.volume_id})`
}

function checkLease({ mapper, state, add }: CheckContext, lease: LeaseRow): void {
  const volume = state.volumesById.get(lease.volume_id)
  if (volume === undefined) {
    add({
      severity: 'warning',
      kind: 'lease-of-nothing',
      object: lease.volume_id,
      message: `the lease that ${lease.holder} took on ${lease.volume_id} is of nothing that can be written`,
      mend: async () =>
        await mapper.catalog.write(async (tx) => {
          const { numDeletedRows } = await tx
            .deleteFrom('leases')
            .where('volume_id', '=', lease.volume_id)
            .where('volume_id', 'not in', tx.selectFrom('volumes').select('id'))
            .executeTakeFirst()
          return numDeletedRows === 0n ? null : 'the lease was deleted'
        }),
    })
  } else if (lease.epoch > volume.epoch) {
    const message = `the lease on ${volume.id} has epoch ${lease.epoch}, the volume is at ${volume.epoch}: bring the catalog back from a backup`
    add({ severity: 'error', kind: 'epoch-behind', object: volume.id, message })
  } else if (lease.released_at === null && mapper.open.volume(lease.volume_id) === undefined) {
    const message = `${volume.id} was not closed by ${lease.holder}: its journal is replayed when it is opened next`
    add({ severity: 'note', kind: 'volume-dirty', object: volume.id, message })
  }
}

async function checkAttachments({ mapper, state, add }: CheckContext): Promise<void> {
  const rows = await mapper.catalog.db.selectFrom('attachments').select(['id', 'volume_id']).execute()
  for (const row of rows) {
    if (state.resourcesById.has(row.volume_id)) continue
    // Asked again: what it attaches may have been made since.
    const made = await mapper.catalog.db.selectFrom('resources').select('id').where('id', '=', row.volume_id).executeTakeFirst()
    if (made !== undefined) continue
    add({
      severity: 'warning',
      kind: 'attachment-of-nothing',
      object: row.id,
      message: `attachment ${row.id} is of ${row.volume_id}, which is not there`,
      mend: async () =>
        await mapper.catalog.write(async (tx) => {
          const { numDeletedRows } = await tx
            .deleteFrom('attachments')
            .where('id', '=', row.id)
            .where('volume_id', 'not in', tx.selectFrom('resources').select('id'))
            .executeTakeFirst()
          return numDeletedRows === 0n ? null : 'the attachment was deleted'
        }),
    })
  }
}

async function checkPageRanges({ mapper, add }: CheckContext): Promise<void> {
  const { db } = mapper.catalog
  for (const range of await db.selectFrom('page_ranges').selectAll().execute()) {
    if (mapper.pageIds.isInFlight(range.first_page_id)) continue
    // Its checkpoint may have ended since the rows were read; it lets go of its numbers after its row.
    const row = db.selectFrom('page_ranges').select('first_page_id').where('first_page_id', '=', range.first_page_id)
    if ((await row.executeTakeFirst()) === undefined) continue
    add({
      severity: 'warning',
      kind: 'page-range-stale',
      object: `page ${range.first_page_id}`,
      message: `pages ${range.first_page_id} to ${range.end_page_id - 1} are recorded for a checkpoint of ${range.volume_id} that does not run: the next start deletes them`,
      mend: async () => {
        await mapper.catalog.write(
          async (tx) => await tx.deleteFrom('page_ranges').where('first_page_id', '=', range.first_page_id).execute(),
        )
        return 'the record was deleted; the next reclaim deletes those pages that are part of nothing'
      },
    })
  }
}
