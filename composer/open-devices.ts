/**
 * Opens resources at the mapper, once each: who needs the device of a resource that is open already shares it.
 * The last user closes it. A volume is opened for writing, every other kind for reading only.
 */
import { AtollError, type ResourceRow } from '@atoll/core'
import type { Mapper, OpenEvent } from '@atoll/mapper'
import type { Device } from '@atoll/native'
import { KeyedLock } from './keyed-lock.ts'

interface OpenEntry {
  device: Device
  users: number
  listeners: Set<FailureListener>
}

/** Told at most once that the device is of no use any more: a sync failed (I6), or the lease was lost (I1). */
export type FailureListener = (event: OpenEvent) => void

/** One user's hold on an open device. */
export interface DeviceHold {
  readonly device: Device
  /** Lets go, once; the last one closes the device. The device is closed even if that throws. */
  release(): Promise<void>
}

export class OpenDevices {
  private readonly mapper: Mapper
  private readonly holder: string
  private readonly entries = new Map<string, OpenEntry>()
  private readonly lock = new KeyedLock()

  constructor(options: { mapper: Mapper; holder: string }) {
    this.mapper = options.mapper
    this.holder = options.holder
  }

  /** Whether the resource is open here. */
  isOpen(resourceId: string): boolean {
    return this.entries.has(resourceId)
  }

  async acquire(resource: Pick<ResourceRow, 'id' | 'kind'>, onFailure?: FailureListener): Promise<DeviceHold> {
    return await this.lock.run(resource.id, async () => {
      const entry = this.entries.get(resource.id) ?? (await this.open(resource))
      entry.users += 1
      if (onFailure !== undefined) entry.listeners.add(onFailure)
      return { device: entry.device, release: () => this.release(resource.id, entry, onFailure) }
    })
  }

  /** Frees what the pool of the resource keeps back for a full disk; the next reclaim takes it back. */
  async releaseReserve(resource: Pick<ResourceRow, 'home_pool_id'>): Promise<void> {
    await (await this.mapper.pools.handle(resource.home_pool_id)).releaseReserve()
  }

  private async open(resource: Pick<ResourceRow, 'id' | 'kind'>): Promise<OpenEntry> {
    const listeners = new Set<FailureListener>()
    const { device } = await this.mapper.open(resource.id, {
      holder: this.holder,
      readOnly: resource.kind !== 'volume',
      onEvent: (event) => {
        if (event.kind === 'flush-failed') return
        for (const listener of listeners) listener(event)
        listeners.clear()
      },
    })
    const entry: OpenEntry = { device, users: 0, listeners }
    this.entries.set(resource.id, entry)
    return entry
  }

  private async release(resourceId: string, entry: OpenEntry, onFailure?: FailureListener): Promise<void> {
    await this.lock.run(resourceId, async () => {
      if (this.entries.get(resourceId) !== entry) throw new AtollError('INTERNAL', `a hold on ${resourceId} was released twice`)
      if (entry.users > 1) {
        entry.users -= 1
        if (onFailure !== undefined) entry.listeners.delete(onFailure)
        return
      }
      this.entries.delete(resourceId)
      await this.mapper.close(resourceId)
    })
  }
}
