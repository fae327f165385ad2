/**
 * A driver around a driver that fails on purpose, from a seed: for tests, and for operators who want to see what a failing
 * disk does before they have one.
 *
 * What must survive what:
 * - EIO from a write or a read: that request fails, nothing else does.
 * - EIO from a sync (`sync`, `segment-sync`): the device is poisoned until its clients are gone (I6); nothing flushed is lost.
 * - ENOSPC from a write or an append: that request fails or waits; deletes and reclaim still work.
 * - a torn append or write: cut or overwritten when the journal is replayed; nothing flushed is lost.
 * - EIO from `create`, `remove`, `punch`: the operation fails as a whole and can be repeated.
 * - any delay: everything waits, nothing is reordered.
 */
import type { Store } from '@atoll/native'
import type { Driver, PoolHandle } from '../driver.ts'
import { guardPool } from '../guard.ts'
import { sealStoreLayer } from '../store-pool.ts'
import { type FaultPlan, type FaultPlanInput, parseFaultOption, parseFaultPlan } from './fault-config.ts'

/**
 * Wraps `inner`; the name is `fault-` with the inner one. Its pools take the inner driver's options and `faults`, a plan as
 * JSON, which comes before `plan`. The plan in force is changed through `setFaults`.
 */
export function withFaults(inner: Driver, plan?: FaultPlanInput): Driver {
  const name = `fault-${inner.name}`
  return {
    name,
    summary: `${inner.summary}; fails on purpose (option faults={"seed":1,"rules":[…]})`,
    canShutOut: inner.canShutOut,

    parseOptions({ faults, ...rest }) {
      parseFaultOption(faults)
      return { ...inner.parseOptions(rest), ...(faults === undefined ? {} : { faults }) }
    },

    async open(context) {
      const { faults, ...options } = context.options
      const inForce = parseFaultOption(faults) ?? parseFaultPlan(plan ?? {})
      const pool = await inner.open({ ...context, options })
      const store = context.engine.faultStore(pool.store)
      store.setFaults(inForce)
      return guardPool(overStore(name, pool, store))
    },

    async inspect(context) {
      const { faults: _, ...options } = context.options
      return await inner.inspect({ ...context, options })
    },
  }
}

/** Changes the faults of an open pool of a `withFaults` driver; its counters start again. */
export function setFaults(pool: PoolHandle, plan: FaultPlanInput): FaultPlan {
  const inForce = parseFaultPlan(plan)
  pool.store.setFaults(inForce)
  return inForce
}

/** Everything that moves or removes bytes goes through `store`; lock, owner and capabilities are the inner pool's. */
function overStore(driver: string, inner: PoolHandle, store: Store): PoolHandle {
  return {
    driver,
    poolId: inner.poolId,
    capabilities: inner.capabilities,
    store,
    createLayer: (id) => store.createLayer(id),
    removeLayer: (id) => store.removeLayer(id),
    listLayers: () => store.listLayers(),
    listLayerIds: () => store.listLayerIds(),
    layerExists: (id) => store.layerExists(id),
    usage: () => store.usage(),
    health: () => inner.health(),
    sealLayer: (id, seal) => sealStoreLayer(store, id, seal),
    punchExcept: (id, keepRuns) => store.punchExcept(id, keepRuns),
    releaseReserve: () => store.releaseReserve(),
    restoreReserve: () => store.restoreReserve(),
    setReserve: (bytes) => inner.setReserve(bytes),
    check: () => inner.check(),
    destroy: () => inner.destroy(),
    close: () => inner.close(),
  }
}
