/**
 * Taking a volume over from a daemon that has it and does not let go: whether that can be done, asked before anything is.
 *
 * Rule: the holder of a pool is shut out by the backend itself, so that nothing of it can land any more, or not at all. Where the
 * backend cannot do that, nobody takes the pool's volumes over: two writers would destroy them.
 */
import { AtollError, isAtollError, type Catalog, type Clock, type PoolRow, type ResourceRow } from '@atoll/core'
import type { Engine } from '@atoll/native'
import type { Driver } from '@atoll/southbound'
import { Background, type MapperLog } from './context.ts'
import { Layers } from './layers.ts'
import { PoolReads } from './pool-reads.ts'
import { Pools } from './pools.ts'

const silent: MapperLog = { debug() {}, info() {}, warn() {}, error() {} }

export interface TakeOverCheck {
  /** May be open for reading only. */
  readonly catalog: Catalog
  readonly engine: Engine
  readonly drivers: readonly Driver[]
  readonly clock: Clock
}

/**
 * Looks at the pools of a resource that this process has not open, its own and those that it writes into or reads from: each is free,
 * or whoever has it can be shut out. Changes nothing.
 * @throws AtollError TAKE_OVER_REFUSED naming all of them; POOL_UNAVAILABLE and the like if a pool cannot be looked at
 */
export async function requireTakeOverPossible(check: TakeOverCheck, resource: ResourceRow): Promise<void> {
  const { catalog, clock, engine } = check
  const pools = new Pools(check)
  // Nothing is made with these: they look up where layers lie.
  const background = new Background(silent)
  const newId = () => {
    throw new AtollError('INTERNAL', 'a look at a catalog makes nothing')
  }
  const layers = new Layers({ catalog, pools, clock, newId, background })
  const sources = await new PoolReads({ catalog, engine, layers }).of(resource)
  for (const id of [resource.home_pool_id, ...sources.map((source) => source.id)]) {
    const pool = await catalog.db.selectFrom('pools').selectAll().where('id', '=', id).executeTakeFirst()
    // What reads from a pool that is not here cannot be opened; who opens it says so.
    if (pool === undefined) continue
    try {
      await (await pools.inspect(pool)).close()
    } catch (error) {
      if (!isAtollError(error, 'POOL_LOCKED')) throw error
      if (!pools.driver(pool.driver).canShutOut) throw takeOverRefused(resource, pool, error)
    }
  }
}

/** Of a pool in which the resource lies, or that it reads from. */
export function takeOverRefused(
  resource: Pick<ResourceRow, 'home_pool_id' | 'kind' | 'name'>,
  pool: Pick<PoolRow, 'id' | 'name' | 'driver'>,
  cause: AtollError,
): AtollError {
  const what = `${resource.kind} ${resource.name}`
  const place = resource.home_pool_id === pool.id ? 'lies in' : 'uses'
  const { owner } = cause.values
  const holder = typeof owner === 'string' ? owner : 'another process'
  return new AtollError(
    'TAKE_OVER_REFUSED',
    `${what} cannot be taken over: it ${place} pool "${pool.name}", which ${holder} has, and a pool of the driver ${pool.driver} cannot shut anybody out. Stop that daemon`,
    { values: { pool: pool.name, poolId: pool.id, driver: pool.driver, owner: holder }, cause },
  )
}
