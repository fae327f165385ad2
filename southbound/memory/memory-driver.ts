/**
 * The memory driver: a pool is pages in memory. It lives as long as its engine, so a pool that is closed and opened again
 * in one process is as it was; nothing survives the process.
 */
import type { Engine, Store } from '@atoll/native'
import type { Driver, PoolContext } from '../driver.ts'
import { inspectStorePool, openStorePool } from '../store-pool.ts'
import { parseMemoryConfig } from './memory-config.ts'

/** Stores by engine and pool: a store must not outlive its engine. */
const storesByEngine = new WeakMap<Engine, Map<string, Store>>()

function keptStore(context: PoolContext): Store {
  let stores = storesByEngine.get(context.engine)
  if (stores === undefined) {
    stores = new Map()
    storesByEngine.set(context.engine, stores)
  }
  let store = stores.get(context.poolId)
  if (store === undefined) {
    store = context.engine.memoryStore({ capacityBytes: parseMemoryConfig(context.options).capacityBytes })
    stores.set(context.poolId, store)
  }
  return store
}

export const memoryDriver: Driver = makeMemoryDriver(keptStore, async (context) => {
  storesByEngine.get(context.engine)?.delete(context.poolId)
})

/**
 * A memory driver whose pools lie in the stores that `storeOf` gives: for crash tests, which record a store's history and
 * open what a power cut would have left of it.
 */
export function makeMemoryDriver(
  storeOf: (context: PoolContext) => Store,
  onDestroyed?: (context: PoolContext) => Promise<void>,
): Driver {
  return {
    name: 'memory',
    summary: 'pages in memory, gone with the process; for tests (option capacity=SIZE)',
    canShutOut: false,

    parseOptions(options) {
      parseMemoryConfig(options)
      return { ...options }
    },

    async open(context) {
      parseMemoryConfig(context.options)
      return openStorePool({
        driver: 'memory',
        poolName: `the memory pool ${context.poolId}`,
        context,
        store: storeOf(context),
        capabilities: { fence: 'lock', offloadDomain: null, sharedByNodes: false },
        onDestroyed: async () => onDestroyed?.(context),
      })
    },

    async inspect(context) {
      parseMemoryConfig(context.options)
      return inspectStorePool({ poolName: `the memory pool ${context.poolId}`, context, store: storeOf(context) })
    },
  }
}
