/** The file driver: a pool is a folder of sparse files, one per layer, with the journals beside them. */
import { stat } from 'node:fs/promises'
import { AtollError, isAtollError } from '@atoll/core'
import type { Store } from '@atoll/native'
import type { Driver, PoolContext, PoolHandle, PoolInspection } from '../driver.ts'
import { inspectStorePool, openStorePool } from '../store-pool.ts'
import { type FileConfig, parseFileConfig } from './file-config.ts'

export const fileDriver: Driver = {
  name: 'file',
  summary: 'sparse files in a local folder (option path=/absolute/folder)',
  canShutOut: false,

  parseOptions(options) {
    const { path } = parseFileConfig(options)
    return { ...options, path }
  },

  async open(context: PoolContext): Promise<PoolHandle> {
    const config = parseFileConfig(context.options)
    const poolName = `the pool at ${config.path}`
    const store = await openStore(context, config, poolName)
    // Files of one file system share blocks (FICLONERANGE), where it is one that knows how (XFS, btrfs).
    const offloadDomain = store.capabilities().canClone ? `file:${(await stat(config.path)).dev}` : null
    return openStorePool({
      driver: fileDriver.name,
      poolName,
      context,
      store,
      reserveBytes: config.reserveBytes,
      // An OFD lock: the kernel drops it with the process, so who gets it may write at once.
      capabilities: { fence: 'lock', offloadDomain, sharedByNodes: false },
    })
  },

  async inspect(context: PoolContext): Promise<PoolInspection> {
    const config = parseFileConfig(context.options)
    const poolName = `the pool at ${config.path}`
    const store = await openStore({ ...context, create: false }, config, poolName)
    return inspectStorePool({ poolName, context, store })
  },
}

async function openStore(context: PoolContext, config: FileConfig, poolName: string): Promise<Store> {
  const create = context.create ?? true
  const unavailable = (why: string, cause: unknown): AtollError =>
    new AtollError('POOL_UNAVAILABLE', `${poolName} cannot be opened: ${why}`, { values: { path: config.path }, cause })
  const found = await stat(config.path).catch((error: NodeJS.ErrnoException) => error)
  if (found instanceof Error) {
    if (found.code !== 'ENOENT') throw unavailable(found.message, found)
    if (!create) throw unavailable('the folder is not there; is its disk mounted?', found)
  } else if (!found.isDirectory()) {
    throw unavailable('it is not a folder', undefined)
  }
  try {
    return await context.engine.openFileStore({
      path: config.path,
      create,
      reserveBytes: context.reserveBytes ?? config.reserveBytes,
    })
  } catch (error) {
    // A folder without the store's sub-folders: nothing was ever put here, so the disk is not the one that is meant.
    if (isAtollError(error, 'LAYER_MISSING'))
      throw unavailable(`it holds no pool; is its disk mounted? (${error.message})`, error)
    throw error
  }
}
