/** Pools: each is open, and what its driver says of it. */
import { toAtollError, type PoolRow } from '@atoll/core'
import type { CheckContext } from './check-finding.ts'
import { lowSpaceFindings } from './pool-settings.ts'

export async function checkPools(check: CheckContext): Promise<void> {
  for (const pool of check.state.pools) {
    check.step()
    await checkPool(check, pool)
  }
}

async function checkPool({ mapper, add }: CheckContext, pool: PoolRow): Promise<void> {
  const handle = mapper.pools.find(pool.id)
  if (handle === undefined) {
    const reason = mapper.pools.failure(pool.id)
    const message = `pool "${pool.name}" is not open${reason === undefined ? '' : ` (${reason.code}: ${reason.message})`}: nothing of what lies in it was looked at`
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
