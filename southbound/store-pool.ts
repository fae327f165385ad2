/**
 * A pool whose layers all lie in one native store: what most drivers are, once they have opened the store.
 *
 * It holds the store's lock from `openStorePool` until `close`, and the owner record names the catalog that opened it.
 */
import { AtollError, isAtollError } from '@atoll/core'
import type { Store, StoreHealth, StoreLock } from '@atoll/native'
import type {
  Finding,
  LayerListing,
  LayerSeal,
  PoolCapabilities,
  PoolCondition,
  PoolContext,
  PoolHandle,
  PoolHealth,
  PoolInspection,
  PoolUsage,
} from './driver.ts'
import { guardPool } from './guard.ts'
import { giveUpOwnership, type OwnerRecord, readOwnerRecord, requireOwnable, takeOwnership } from './owner-record.ts'

export interface StorePoolOptions {
  /** Name of the driver. */
  driver: string
  /** For messages: `the pool at /var/lib/atoll/pool`. */
  poolName: string
  context: PoolContext
  store: Store
  /** What the pool's options say; absent: it keeps none. */
  reserveBytes?: number
  /** What the driver adds to what the store says. */
  capabilities: Pick<PoolCapabilities, 'fence' | 'offloadDomain' | 'sharedByNodes'>
  /** What is to be said of the pool after a look at the store; absent: nothing. */
  conditionsOf?: (health: StoreHealth) => PoolCondition[]
  /** Called when the pool is deleted, after the lock was released. */
  onDestroyed?: () => Promise<void>
}

/**
 * Takes the store's lock and the ownership of the pool.
 * @throws AtollError POOL_LOCKED naming the holder, POOL_OWNED_BY_OTHER naming the catalog, POOL_CORRUPT, FORMAT_VERSION
 */
export async function openStorePool(options: StorePoolOptions): Promise<PoolHandle> {
  const { context, poolName, store } = options
  // Before anybody is shut out: the daemon of another catalog has it by right.
  if (context.shutOutHolder === true) await requireOwnable(store, poolName, context.catalogId, context.takeOverFrom)
  const lock = await takeLock(options)
  try {
    const owner = await withReserve(store, () =>
      takeOwnership(store, poolName, context.catalogId, context.now(), context.takeOverFrom),
    )
    // A reserve that was given up on a full disk comes back when there is space again; without it the pool works too.
    await store.restoreReserve()
    return guardPool(new StorePool(options, lock, owner))
  } catch (error) {
    await lock.release()
    throw error
  }
}

/**
 * Takes the store's lock and reads whose pool it is.
 * @throws AtollError POOL_LOCKED naming the holder, POOL_CORRUPT, FORMAT_VERSION
 */
export async function inspectStorePool(
  options: Pick<StorePoolOptions, 'context' | 'poolName' | 'store'>,
): Promise<PoolInspection> {
  const { poolName, store } = options
  const lock = await takeLock(options)
  try {
    const owner = await readOwnerRecord(store, poolName)
    return { store, owner, close: () => lock.release() }
  } catch (error) {
    await lock.release()
    throw error
  }
}

/** A pool opens on a full disk, too: else nothing of it could be read, and nothing deleted. */
async function withReserve<T>(store: Store, fn: () => Promise<T>): Promise<T> {
  try {
    return await fn()
  } catch (error) {
    if (!isAtollError(error, 'NO_SPACE')) throw error
    await store.releaseReserve()
    return await fn()
  }
}

async function takeLock({
  store,
  poolName,
  context,
}: Pick<StorePoolOptions, 'context' | 'poolName' | 'store'>): Promise<StoreLock> {
  try {
    return await store.lock(context.ownerText, { shutOutHolder: context.shutOutHolder ?? false })
  } catch (error) {
    if (!isAtollError(error, 'STORE_LOCKED')) throw error
    const owner = /locked by (.+)$/s.exec(error.message)?.[1]?.trim() || 'owner unknown'
    throw new AtollError('POOL_LOCKED', `${poolName} is open in another process (${owner}): stop it first`, {
      values: { pool: poolName, owner },
      cause: error,
    })
  }
}

/**
 * Seals a layer of `store`. The journal alone can be sealed without its layer, which would hide until the next read that the
 * layer is missing: so it is looked for first.
 */
export async function sealStoreLayer(store: Store, id: string, seal: LayerSeal): Promise<void> {
  if (!(await store.layerExists(id))) {
    throw new AtollError('LAYER_MISSING', `layer ${id} is to be sealed but is not in the pool`, { values: { layerId: id } })
  }
  await store.sealLayer(id, seal.volumeId, seal.epoch, seal.finalLsn, seal.successor)
}

class StorePool implements PoolHandle {
  readonly driver: string
  readonly poolId: string
  readonly capabilities: PoolCapabilities
  readonly store: Store
  readonly #options: StorePoolOptions
  readonly #lock: StoreLock
  readonly #owner: OwnerRecord

  constructor(options: StorePoolOptions, lock: StoreLock, owner: OwnerRecord) {
    this.driver = options.driver
    this.poolId = options.context.poolId
    this.store = options.store
    // Of whom a store can share blocks with, the driver says more.
    const { canClone: _, ...capabilities } = options.store.capabilities()
    this.capabilities = { ...capabilities, ...options.capabilities }
    this.#options = options
    this.#lock = lock
    this.#owner = owner
  }

  createLayer(id: string): Promise<void> {
    return this.store.createLayer(id)
  }

  removeLayer(id: string): Promise<void> {
    return this.store.removeLayer(id)
  }

  listLayers(): Promise<LayerListing[]> {
    return this.store.listLayers()
  }

  listLayerIds(): Promise<string[]> {
    return this.store.listLayerIds()
  }

  layerExists(id: string): Promise<boolean> {
    return this.store.layerExists(id)
  }

  usage(): Promise<PoolUsage> {
    return this.store.usage()
  }

  health(): PoolHealth {
    const nowMs = this.#options.context.now()
    const health = this.store.health()
    if (health === null) return { observedAt: nowMs, answerMs: null, conditions: [] }
    const { observedAgoMs, answerMs = null } = health
    return { observedAt: nowMs - Math.round(observedAgoMs), answerMs, conditions: this.#options.conditionsOf?.(health) ?? [] }
  }

  sealLayer(id: string, seal: LayerSeal): Promise<void> {
    return sealStoreLayer(this.store, id, seal)
  }

  punchExcept(id: string, keepRuns: Float64Array): Promise<number> {
    return this.store.punchExcept(id, keepRuns)
  }

  releaseReserve(): Promise<void> {
    return this.store.releaseReserve()
  }

  restoreReserve(): Promise<number> {
    return this.store.restoreReserve()
  }

  async setReserve(wantedBytes: number | null): Promise<void> {
    const { poolName, reserveBytes } = this.#options
    const bytes = wantedBytes ?? reserveBytes ?? 0
    // A store that keeps no reserve says that there are 0 bytes of it, whatever is asked for.
    if ((await this.store.setReserve(bytes)) === bytes) return
    throw new AtollError('POOL_UNSUPPORTED', `${poolName} keeps no reserve`, { values: { pool: poolName } })
  }

  async check(): Promise<Finding[]> {
    const { poolName } = this.#options
    const conditions = this.health().conditions.map(({ kind, severity, message }) => {
      return { severity, kind: `backend-${kind}`, object: poolName, message }
    })
    return [...conditions, ...(await this.#checkOwner())]
  }

  async destroy(): Promise<void> {
    const layers = await this.store.listLayerIds()
    if (layers.length > 0) {
      throw new AtollError(
        'POOL_NOT_EMPTY',
        `${this.#options.poolName} still holds ${layers.length} layers (${layers[0]}, …): delete what lies in it and reclaim first`,
        { values: { pool: this.#options.poolName, layerCount: layers.length } },
      )
    }
    await giveUpOwnership(this.store, this.#owner, this.#options.context.now())
    await this.#lock.release()
    await this.#options.onDestroyed?.()
  }

  async close(): Promise<void> {
    await this.#lock.release()
  }

  async #checkOwner(): Promise<Finding[]> {
    const { poolName, context } = this.#options
    const finding = (kind: string, message: string): Finding[] => [{ severity: 'error', kind, object: poolName, message }]
    try {
      const found = await readOwnerRecord(this.store, poolName)
      if (found === null)
        return finding('owner-record-missing', 'The owner record is gone: restart the daemon, which writes it again.')
      if (found.catalogId === context.catalogId && found.epoch === this.#owner.epoch) return []
      return finding(
        'owner-record-foreign',
        `The owner record names catalog ${found.catalogId} with epoch ${found.epoch}, this daemon holds epoch ${this.#owner.epoch}: ` +
          'another daemon has taken the pool; stop one of them.',
      )
    } catch (error) {
      if (!isAtollError(error)) throw error
      return finding('owner-record-unreadable', error.message)
    }
  }
}
