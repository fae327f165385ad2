/** The ceph driver: a pool is a namespace of a RADOS pool, a layer is objects of 4 MiB in it. */
import { AtollError, isAtollError } from '@atoll/core'
import type { Store } from '@atoll/native'
import type { Driver, PoolContext, PoolHandle, PoolInspection } from '../driver.ts'
import { inspectStorePool, openStorePool } from '../store-pool.ts'
import { type CephConfig, parseCephConfig } from './ceph-config.ts'
import { conditionsOf } from './ceph-health.ts'

const nameOf = ({ pool, namespace }: CephConfig): string => `the pool in namespace ${namespace} of Ceph pool ${pool}`

export const cephDriver: Driver = {
  name: 'ceph',
  summary: 'objects in a RADOS pool (options pool=NAME conf=/path user=NAME namespace=NAME)',
  canShutOut: true,

  parseOptions(options) {
    const { conf, keyring } = parseCephConfig(options)
    return { ...options, ...(conf !== null && { conf }), ...(keyring !== null && { keyring }) }
  },

  async open(context: PoolContext): Promise<PoolHandle> {
    const config = parseCephConfig(context.options)
    return openStorePool({
      driver: cephDriver.name,
      poolName: nameOf(config),
      context,
      store: await openStore(context, config, context.create ?? true),
      // Who breaks the lock of a daemon that is gone has shut it out of the cluster before. Copies go through this machine.
      capabilities: { fence: 'blocklist', offloadDomain: null, sharedByNodes: false },
      conditionsOf: (health) => conditionsOf(config.pool, health),
    })
  },

  async inspect(context: PoolContext): Promise<PoolInspection> {
    const config = parseCephConfig(context.options)
    return inspectStorePool({ poolName: nameOf(config), context, store: await openStore(context, config, false) })
  },
}

async function openStore(context: PoolContext, config: CephConfig, create: boolean): Promise<Store> {
  try {
    return await context.engine.openRadosStore({ ...config, create })
  } catch (error) {
    if (isAtollError(error, 'LAYER_MISSING')) {
      throw new AtollError('POOL_UNAVAILABLE', `${nameOf(config)} cannot be opened: ${error.message}`, {
        values: { pool: config.pool, namespace: config.namespace },
        cause: error,
      })
    }
    throw error
  }
}
