/** Pools: each is open, and what its driver says of it. */
import { toAtollError, type PoolRow } from '@atoll/core'
import type { CheckContext } from './check-finding.ts'
import { namePools, type PoolLinks, readersOf, readLinks, sourcesOf } from './pool-links.ts'
import { lowSpaceFindings } from './pool-settings.ts'

export async function checkPools(check: CheckContext): Promise<void> {
  const links = await readLinks(check.mapper.catalog.db)
  for (const pool of check.state.pools) {
    check.step()
    checkLinks(check, pool, links)
    await checkPool(check, pool, links)
  }
}

/** Pools of a lost catalog that were not imported yet. */
function checkLinks({ add }: CheckContext, pool: PoolRow, links: PoolLinks): void {
  const readers = readersOf(links, pool.id).filter((other) => other.isAbsent)
  if (readers.length > 0) {
    const message = `pools that read from pool "${pool.name}" are not here (${namePools(readers)}): nothing of it is freed until they are imported, or given up (atoll pool accept ${pool.name})`
    add({ severity: 'warning', kind: 'pool-reader-missing', object: pool.id, message })
  }
  const sources = sourcesOf(links, pool.id).filter((other) => other.isAbsent)
  if (sources.length > 0) {
    const message = `pool "${pool.name}" may read from pools that are not here: import ${namePools(sources)}`
    add({ severity: 'warning', kind: 'pool-source-missing', object: pool.id, message })
  }
}

async function checkPool({ mapper, add }: CheckContext, pool: PoolRow, links: PoolLinks): Promise<void> {
  const handle = mapper.pools.find(pool.id)
  if (handle === undefined) {
    const reason = mapper.pools.failure(pool.id)
    const readers = readersOf(links, pool.id)
    const message = `pool "${pool.name}" is not open${reason === undefined ? '' : ` (${reason.code}: ${reason.message})`}: nothing of what lies in it was looked at${readers.length === 0 ? '' : `, and what reads from it cannot be opened (pools ${namePools(readers)})`}`
    add({ severity: 'error', kind: 'pool-unavailable', object: pool.id, message })
    return
  }
  try {
    for (const finding of [...(await handle.check()), ...lowSpaceFindings(pool, await handle.usage())]) add(finding)
  } catch (error) {
    const { code, message } = toAtollError(error)
    add({ severity: 'error', kind: 'backend-failed', object: pool.id, message: `pool "${pool.name}": ${code}: ${message}` })
  }
}
