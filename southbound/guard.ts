/**
 * The checks that every driver would need, made once, around it: the pool is open, ids are ids, ranges are in range and in
 * order, the pool can do what it is asked for, and a failure is an error of ours. Drivers then read as the bare operation.
 *
 * Rule: `close` and `destroy` wait for the calls that are running, and every call that comes after them is refused with
 * POOL_CLOSED.
 */
import { AtollError, isAtollError, isId, toAtollError, volumeSizeMaxBytes } from '@atoll/core'
import { slotBytes, type Store } from '@atoll/native'
import type { Finding, LayerListing, LayerSeal, PoolCapabilities, PoolHandle, PoolHealth, PoolUsage } from './driver.ts'

const slotCountMax = volumeSizeMaxBytes / slotBytes

/** Wraps a driver's bare pool. */
export function guardPool(inner: PoolHandle): PoolHandle {
  return new GuardedPool(inner)
}

class GuardedPool implements PoolHandle {
  readonly driver: string
  readonly poolId: string
  readonly capabilities: PoolCapabilities
  readonly store: Store
  readonly #inner: PoolHandle
  readonly #running = new Set<Promise<unknown>>()
  #closing: Promise<void> | undefined

  constructor(inner: PoolHandle) {
    this.#inner = inner
    this.driver = inner.driver
    this.poolId = inner.poolId
    this.capabilities = inner.capabilities
    this.store = inner.store
  }

  async createLayer(id: string): Promise<void> {
    requireId('layer', id)
    await this.#call(() => this.#inner.createLayer(id))
  }

  async removeLayer(id: string): Promise<void> {
    requireId('layer', id)
    await this.#call(() => this.#inner.removeLayer(id))
  }

  listLayers(): Promise<LayerListing[]> {
    return this.#call(() => this.#inner.listLayers())
  }

  listLayerIds(): Promise<string[]> {
    return this.#call(() => this.#inner.listLayerIds())
  }

  async layerExists(id: string): Promise<boolean> {
    requireId('layer', id)
    return this.#call(() => this.#inner.layerExists(id))
  }

  usage(): Promise<PoolUsage> {
    return this.#call(() => this.#inner.usage())
  }

  health(): PoolHealth {
    this.#requireOpen()
    return this.#inner.health()
  }

  async sealLayer(id: string, seal: LayerSeal): Promise<void> {
    requireId('layer', id)
    requireId('volume', seal.volumeId)
    if (seal.successor !== null) requireId('successor', seal.successor)
    requireCount('epoch', seal.epoch)
    requireCount('finalLsn', seal.finalLsn)
    await this.#call(() => this.#inner.sealLayer(id, seal))
  }

  async punchExcept(id: string, keepRuns: Float64Array): Promise<number> {
    requireId('layer', id)
    if (this.capabilities.punchUnitBytes === 0) {
      throw new AtollError('POOL_UNSUPPORTED', `pool ${this.poolId} (${this.driver}) cannot free parts of a layer`, {
        values: { poolId: this.poolId, driver: this.driver },
      })
    }
    requireRuns(keepRuns)
    return this.#call(() => this.#inner.punchExcept(id, keepRuns))
  }

  releaseReserve(): Promise<void> {
    return this.#call(() => this.#inner.releaseReserve())
  }

  restoreReserve(): Promise<number> {
    return this.#call(() => this.#inner.restoreReserve())
  }

  async setReserve(bytes: number | null): Promise<void> {
    if (bytes !== null) requireCount('reserve', bytes)
    await this.#call(() => this.#inner.setReserve(bytes))
  }

  check(): Promise<Finding[]> {
    return this.#call(() => this.#inner.check())
  }

  /** A refusal (POOL_NOT_EMPTY) leaves the pool open. */
  async destroy(): Promise<void> {
    this.#requireOpen()
    const destroyed = this.#settled().then(() => this.#inner.destroy())
    // Whoever calls `close` meanwhile waits for it, and nothing new begins.
    this.#closing = destroyed.catch(() => {})
    try {
      await destroyed
    } catch (error) {
      this.#closing = undefined
      throw toPoolError(error)
    }
  }

  close(): Promise<void> {
    this.#closing ??= this.#settled().then(() => this.#inner.close())
    return this.#closing
  }

  async #call<T>(fn: () => Promise<T>): Promise<T> {
    this.#requireOpen()
    const running = fn()
    this.#running.add(running)
    try {
      return await running
    } catch (error) {
      throw toPoolError(error)
    } finally {
      this.#running.delete(running)
    }
  }

  async #settled(): Promise<void> {
    await Promise.allSettled(this.#running)
  }

  #requireOpen(): void {
    if (this.#closing === undefined) return
    throw new AtollError('POOL_CLOSED', `pool ${this.poolId} (${this.driver}) is closed`, {
      values: { poolId: this.poolId, driver: this.driver },
    })
  }
}

/** What a driver lets through that is not an error of ours is the backend's failure, not a defect of this program. */
function toPoolError(error: unknown): AtollError {
  if (isAtollError(error)) return error
  const { code } = error as NodeJS.ErrnoException
  if (typeof code === 'string' && /^E[A-Z]+$/.test(code)) {
    return new AtollError('IO_ERROR', (error as Error).message, { cause: error, values: { errno: code } })
  }
  return toAtollError(error)
}

function requireId(what: string, id: string): void {
  if (isId(id)) return
  throw new AtollError('ID_INVALID', `${what} id "${id}" is not a lower-case UUID`, { values: { what, id } })
}

function requireCount(what: string, value: number): void {
  if (Number.isSafeInteger(value) && value >= 0) return
  throw new AtollError('ARGUMENT_INVALID', `${what} ${value} is not a whole number from 0 on`, { values: { what, value } })
}

/** A run that is out of order or of range would have what it should keep punched: better stop. */
function requireRuns(runs: Float64Array): void {
  const refuse = (index: number, why: string): never => {
    throw new AtollError('ARGUMENT_INVALID', `run ${index / 3} of the slots to keep ${why}`, { values: { runIndex: index / 3 } })
  }
  if (runs.length % 3 !== 0) refuse(runs.length - (runs.length % 3), 'is cut short: three numbers are wanted')
  let end = 0
  for (let index = 0; index < runs.length; index += 3) {
    const [start, count] = [runs[index] ?? Number.NaN, runs[index + 1] ?? Number.NaN]
    if (!Number.isSafeInteger(start) || !Number.isSafeInteger(count) || count <= 0)
      refuse(index, `(${start}, ${count}) has no whole numbers`)
    if (start < end) refuse(index, `begins at slot ${start}, before the end of the one in front of it (${end})`)
    end = start + count
    if (end > slotCountMax) refuse(index, `ends at slot ${end}, past the end of the address space (${slotCountMax})`)
  }
}
