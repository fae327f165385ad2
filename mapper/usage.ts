/**
 * What a resource takes: bytes that only it refers to, and bytes that others refer to as well.
 *
 * Counted by layer: a layer that no other durable root refers to is the resource's own; of every other one the slots that its
 * map refers to are shared. Both are bounded by what the layer has allocated, because a fresh volume's map gives all of its
 * slots to one layer whether they were written or not (allocation is a hint for status, never for meaning, I4).
 *
 * Cost: the layers of every root have to be known. They are remembered by root, since the content of a root never changes;
 * the first call after a start reads the pages of all roots once, a later one those of the roots that changed. The
 * allocation of layers comes from a listing of the pool that is at most `listingAgeMaxMs` old.
 */
import { isAtollError } from '@atoll/core'
import type { RootRef } from '@atoll/native'
import type { MapperContext } from './context.ts'
import { feedReach } from './maps.ts'
import { rootOf } from './root.ts'
import { requireResource } from './rows.ts'
import { roundUpToSlot, slotBytes } from './size.ts'

export interface ResourceUsage {
  /** Only this resource refers to them. */
  readonly usedBytes: number
  /** Others refer to them, too. */
  readonly sharedBytes: number
}

/** A page of a map is missing, damaged or of a newer version. */
export function isMapUnreadable(error: unknown): boolean {
  return isAtollError(error, 'PAGE_MISSING') || isAtollError(error, 'PAGE_CORRUPT') || isAtollError(error, 'FORMAT_VERSION')
}

const listingAgeMaxMs = 1000
/** Roots remembered beyond those that are there now. */
const rememberedSlack = 256

interface RootSummary {
  /** Slots by layer. */
  readonly slots: ReadonlyMap<number, number>
}

interface Listing {
  readonly takenMs: number
  readonly allocatedBytes: ReadonlyMap<string, number>
}

interface RootRow {
  readonly id: string
  readonly size_bytes: number
  readonly root_word: bigint
  readonly root_crc: number
  readonly home_pool_id: string
}

export class Usage {
  readonly #context: MapperContext
  readonly #summaries = new Map<string, RootSummary>()
  readonly #listings = new Map<string, Listing>()

  constructor(context: MapperContext) {
    this.#context = context
  }

  /**
   * Usage of one resource, as of its durable root.
   * @throws AtollError RESOURCE_NOT_FOUND, PAGE_MISSING, PAGE_CORRUPT naming the resource whose map cannot be read
   */
  async of(resourceId: string): Promise<ResourceUsage> {
    return await this.#context.pins.run(async () => {
      const roots = await this.#roots()
      const own = roots.find((row) => row.id === resourceId)
      if (own === undefined) {
        await requireResource(this.#context.catalog.db, resourceId)
        return { usedBytes: 0, sharedBytes: 0 }
      }
      const mine = await this.#summary(own)
      const shared = new Set<number>()
      if (mine.slots.size > 0) {
        for (const row of roots) {
          if (row.id === resourceId) continue
          for (const alias of (await this.#summaryIfReadable(row))?.slots.keys() ?? [])
            if (mine.slots.has(alias)) shared.add(alias)
        }
      }
      let usedBytes = 0
      let sharedBytes = 0
      for (const [alias, bytes] of await this.#bytesByLayer(mine)) {
        if (shared.has(alias)) sharedBytes += bytes
        else usedBytes += bytes
      }
      return { usedBytes, sharedBytes }
    })
  }

  /** Bytes that the resources of a pool refer to, each counted for itself: what they would take without sharing. */
  async logicalBytes(poolId: string): Promise<number> {
    return await this.#context.pins.run(async () => {
      let logicalBytes = 0
      for (const row of await this.#roots()) {
        if (row.home_pool_id !== poolId) continue
        const summary = await this.#summaryIfReadable(row)
        if (summary === null) continue
        for (const bytes of (await this.#bytesByLayer(summary)).values()) logicalBytes += bytes
      }
      return logicalBytes
    })
  }

  async #roots(): Promise<RootRow[]> {
    const rows = await this.#context.catalog.db
      .selectFrom('resources')
      .select(['id', 'size_bytes', 'root_word', 'root_crc', 'home_pool_id'])
      .execute()
    // Oldest first: a root that is asked for again is put at the end by `#summary`.
    for (const key of this.#summaries.keys()) {
      if (this.#summaries.size <= rows.length + rememberedSlack) break
      this.#summaries.delete(key)
    }
    return rows
  }

  async #summary(row: RootRow): Promise<RootSummary> {
    const root: RootRef = rootOf(row)
    const sizeBytes = roundUpToSlot(row.size_bytes)
    // A page id is never used twice while the process lives, so a word names one content.
    const key = `${root.word}:${root.crc}:${sizeBytes}`
    let summary = this.#summaries.get(key)
    if (summary === undefined) {
      const reach = this.#context.engine.reach()
      reach.addRoot(root, sizeBytes)
      await feedReach(this.#context, reach, row.id)
      summary = { slots: new Map(Array.from(reach.layers(), (alias): [number, number] => [alias, reach.slotCount(alias)])) }
    }
    this.#summaries.delete(key)
    this.#summaries.set(key, summary)
    return summary
  }

  /** null: the map cannot be read, so what it refers to is not known; that must not hide what others take. */
  async #summaryIfReadable(row: RootRow): Promise<RootSummary | null> {
    try {
      return await this.#summary(row)
    } catch (error) {
      if (isMapUnreadable(error)) return null
      throw error
    }
  }

  async #bytesByLayer(summary: RootSummary): Promise<Map<number, number>> {
    const bytes = new Map<number, number>()
    for (const { alias, id, poolId } of await this.#context.layers.homes(summary.slots.keys())) {
      const allocatedBytes = (await this.#listing(poolId)).get(id) ?? 0
      bytes.set(alias, Math.min(allocatedBytes, (summary.slots.get(alias) ?? 0) * slotBytes))
    }
    return bytes
  }

  async #listing(poolId: string): Promise<ReadonlyMap<string, number>> {
    const nowMs = this.#context.clock.monotonicMs()
    const present = this.#listings.get(poolId)
    if (present !== undefined && nowMs - present.takenMs < listingAgeMaxMs) return present.allocatedBytes
    const layers = (await this.#context.pools.find(poolId)?.listLayers()) ?? []
    const allocatedBytes = new Map(layers.map((layer) => [layer.id, layer.allocatedBytes]))
    this.#listings.set(poolId, { takenMs: nowMs, allocatedBytes })
    return allocatedBytes
  }
}
