/**
 * Taking a volume over from a daemon that has it and does not let go: whether that can be done, asked before anything is.
 *
 * Rule: the holder of a pool is shut out by the backend itself, so that nothing of it can land any more, or not at all. Where the
 * backend cannot do that, nobody takes the pool's volumes over: two writers would destroy them.
 */
import { AtollError, isAtollError, type Catalog, type Clock, type PoolRow } from '@atoll/core'
import type { Engine } from '@atoll/native'
import type { Driver } from '@atoll/southbound'
import { Pools } from './pools.ts'

export interface TakeOverCheck {
  /** May be open for reading only. */
  readonly catalog: Catalog
  readonly engine: Engine
  readonly drivers: readonly Driver[]
  readonly clock: Clock
}

/**
 * Looks at a pool that this process has not open: it is free, or whoever has it can be shut out. Changes nothing. `what` lies in it,
 * for people.
 * @throws AtollError TAKE_OVER_REFUSED naming all of them; POOL_UNAVAILABLE and the like if the pool cannot be looked at
 */
export async function requireTakeOverPossible(check: TakeOverCheck, pool: PoolRow, what: string): Promise<void> {
  const pools = new Pools(check)
  try {
    await (await pools.inspect(pool)).close()
  } catch (error) {
    if (!isAtollError(error, 'POOL_LOCKED')) throw error
    if (!pools.driver(pool.driver).canShutOut) throw takeOverRefused(what, pool, error)
  }
}

export function takeOverRefused(what: string, pool: Pick<PoolRow, 'id' | 'name' | 'driver'>, cause: AtollError): AtollError {
  const { owner } = cause.values
  const holder = typeof owner === 'string' ? owner : 'another process'
  return new AtollError(
    'TAKE_OVER_REFUSED',
    `${what} cannot be taken over: it lies in pool "${pool.name}", which ${holder} has, and a pool of the driver ${pool.driver} cannot shut anybody out. Stop that daemon`,
    { values: { pool: pool.name, poolId: pool.id, driver: pool.driver, owner: holder }, cause },
  )
}
