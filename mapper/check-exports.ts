/** The exports of the pools: each is written, whole, and not newer than the catalog. */
import { toAtollError } from '@atoll/core'
import type { CheckContext } from './check-finding.ts'
import { loadExport } from './export-load.ts'

export async function checkExports({ mapper, state, add, step }: CheckContext): Promise<void> {
  for (const pool of state.pools) {
    step()
    const status = mapper.exporter.status(pool.id)
    const handle = mapper.pools.find(pool.id)
    if (status === null || handle === undefined) continue
    const refused = [...mapper.olderCatalog.refused(pool.id).keys()].filter((id) => state.resourcesById.has(id))
    if (status.state === 'ahead') {
      add({
        severity: 'error',
        kind: 'catalog-older',
        object: pool.id,
        message: `pool "${pool.name}" was used by a newer state of this catalog: ${refused.length} resources that it deleted or changed are refused, and nothing of the pool is freed; bring the newer catalog back, import the pool into a fresh home (atoll pool import), or give up what is newer (atoll pool accept)`,
      })
      continue
    }
    for (const id of refused) {
      const row = state.resourcesById.get(id)
      const message = `${row?.kind} "${row?.name}" is of a time before what was given up in pool "${pool.name}": what it holds may be gone, so it is refused; delete it, or roll a volume back to one of its snapshots`
      add({ severity: 'error', kind: 'catalog-older', object: id, message })
    }
    if (status.state === 'behind') {
      const why = status.error === null ? '' : ` (${status.error.code}: ${status.error.message})`
      add({
        severity: 'warning',
        kind: 'export-behind',
        object: pool.id,
        message: `what pool "${pool.name}" says of itself cannot be written${why}: a lost catalog would come back older than it was, and nothing of the pool is freed`,
      })
    }
    try {
      const found = await loadExport(handle.store, { rowsOnly: true })
      for (const { record, message } of found?.damages ?? []) {
        add({
          severity: 'warning',
          kind: 'export-damaged',
          object: record,
          message: `${record} in pool "${pool.name}" ${message}: a lost catalog could not be brought back whole; a repair writes it anew`,
          mend: async () => {
            await mapper.exporter.renew(pool.id)
            return 'what the pool says of itself was written anew'
          },
        })
      }
    } catch (error) {
      const { code, message } = toAtollError(error)
      add({
        severity: 'warning',
        kind: 'export-damaged',
        object: pool.id,
        message: `the export of pool "${pool.name}" cannot be read: ${code}: ${message}`,
      })
    }
  }
}
