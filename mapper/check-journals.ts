/**
 * Journals of what is written: of the active and of the next layer, as an open after a crash would read them.
 *
 * A volume's lock is held while its journal is looked at: its row and its journal then belong together. Flushes go on; the frame
 * that one of them is writing at this moment counts as a torn tail, which is none of a check's business.
 */
import { isAtollError, toAtollError, type VolumeRow } from '@atoll/core'
import type { CheckContext, CheckKind } from './check-finding.ts'

const errorKinds: Readonly<Record<string, CheckKind>> = {
  JOURNAL_CORRUPT: 'journal-corrupt',
  CATALOG_BEHIND: 'catalog-behind',
  FORMAT_VERSION: 'journal-version',
}

export async function checkJournals(check: CheckContext): Promise<void> {
  for (const { id } of check.state.volumes) {
    check.step()
    await check.mapper.locks.run([id], async () => {
      const volume = await check.mapper.catalog.db.selectFrom('volumes').selectAll().where('id', '=', id).executeTakeFirst()
      if (volume !== undefined) await checkVolumeJournal(check, volume)
    })
  }
}

async function checkVolumeJournal(check: CheckContext, volume: VolumeRow): Promise<void> {
  const { mapper, state, add } = check
  const name = state.resourcesById.get(volume.id)?.name ?? volume.id
  const report = (kind: CheckKind, message: string): void =>
    add({ severity: 'error', kind, object: volume.id, message: `volume "${name}": ${message}` })
  let lastLsn = volume.map_lsn
  let waiting = 0
  try {
    for (const alias of [volume.active_alias, ...(volume.next_alias === null ? [] : [volume.next_alias])]) {
      const [home] = await mapper.layers.homes([alias], state.resourcesById.get(volume.id)?.home_pool_id ?? '')
      const pool = home === undefined ? undefined : mapper.pools.find(home.poolId)
      // What keeps the pool closed, or the row of the layer away, is told elsewhere.
      if (home === undefined || pool === undefined) return
      const journal = await pool.store.inspectJournal(home.id, volume.id, volume.epoch, lastLsn)
      if (journal.writer !== undefined && journal.writer.epoch > volume.epoch) {
        report(
          'catalog-behind',
          `the journal of layer ${home.id} is written under epoch ${journal.writer.epoch} by ${journal.writer.owner || 'somebody'}, and the catalog knows of epoch ${volume.epoch}: the volume was opened from another copy of the catalog; bring that one back, or see to it that nobody uses it`,
        )
      }
      if (journal.seal !== undefined) {
        report(
          'catalog-behind',
          `layer ${home.id} is sealed in its pool, but the volume is to write it: the catalog is older than the pool; bring a newer catalog back`,
        )
      }
      const foreign = journal.owners.filter((owner) => owner !== 0 && owner !== alias)
      if (foreign.length > 0)
        report('journal-corrupt', `the journal of layer ${home.id} gives slots to layer ${foreign[0]}, which it cannot`)
      lastLsn = Math.max(lastLsn, journal.lastLsn)
      waiting += journal.frameCount
    }
  } catch (error) {
    const { code, message } = toAtollError(error)
    if (isAtollError(error, 'LAYER_MISSING')) return
    report(errorKinds[code] ?? 'backend-failed', message)
    return
  }
  const lease = state.leases.find((row) => row.volume_id === volume.id)
  const isClean = mapper.open.volume(volume.id) === undefined && lease?.released_at !== null
  if (waiting > 0 && isClean && lease !== undefined) {
    const message = `volume "${name}": its journal has ${waiting} frames that the catalog, in which it was closed properly, does not have; they are replayed when it is opened: the catalog is older than the pool`
    add({ severity: 'warning', kind: 'journal-ahead', object: volume.id, message })
  }
}
