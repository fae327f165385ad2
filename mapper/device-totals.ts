/**
 * What the devices of each pool have done since this process started, those that are closed included: totals only grow, so
 * that whoever looks twice can take the difference.
 *
 * A device counts for the home pool of its resource, also for what it reads of layers that lie in another one.
 */
import { addLatencies, noLatencies, type Latencies } from '@atoll/core'
import type { Device } from '@atoll/native'

/** Of one device, or of several together. */
export interface DeviceTotals {
  readonly readOperations: number
  readonly readBytes: number
  readonly writeOperations: number
  readonly writeBytes: number
  readonly discardOperations: number
  readonly flushOperations: number
  readonly throttledOperations: number
  /** How long clients' requests took; see `DeviceLatencies` of the engine. */
  readonly read: Latencies
  readonly write: Latencies
  readonly discard: Latencies
  readonly flush: Latencies
  /** How long the backend took. */
  readonly backendRead: Latencies
  readonly backendSync: Latencies
  /** Now: requests of clients that workers have, reads and syncs that wait for the backend. */
  readonly requestsWaiting: number
  readonly backendReadsRunning: number
  readonly backendSyncsRunning: number
}

export const noTotals: DeviceTotals = {
  readOperations: 0,
  readBytes: 0,
  writeOperations: 0,
  writeBytes: 0,
  discardOperations: 0,
  flushOperations: 0,
  throttledOperations: 0,
  read: noLatencies,
  write: noLatencies,
  discard: noLatencies,
  flush: noLatencies,
  backendRead: noLatencies,
  backendSync: noLatencies,
  requestsWaiting: 0,
  backendReadsRunning: 0,
  backendSyncsRunning: 0,
}

export function totalsOf(device: Device): DeviceTotals {
  const {
    dirtyLeaves: _leaves,
    journalBytes: _bytes,
    lsn: _lsn,
    poisoned: _poisoned,
    firstWriteSlots: _slots,
    ...counters
  } = device.stats()
  return { ...counters, ...device.latencies() }
}

export function addTotals(a: DeviceTotals, b: DeviceTotals): DeviceTotals {
  const sum = Object.entries(a).map(([name, value]: [string, number | Latencies]) => {
    const other = b[name as keyof DeviceTotals]
    return [name, typeof value === 'number' ? value + (other as number) : addLatencies(value, other as Latencies)]
  })
  return Object.fromEntries(sum) as DeviceTotals
}

/** Totals by pool. */
export class PoolTotals {
  readonly #closed = new Map<string, DeviceTotals>()

  /** A device is open no more. */
  addClosed(poolId: string, device: Device): void {
    const running = { requestsWaiting: 0, backendReadsRunning: 0, backendSyncsRunning: 0 }
    this.#closed.set(poolId, addTotals(this.#closed.get(poolId) ?? noTotals, { ...totalsOf(device), ...running }))
  }

  /** With what is open now. */
  with(open: Iterable<{ readonly poolId: string; readonly device: Device }>): Map<string, DeviceTotals> {
    const totals = new Map(this.#closed)
    for (const { poolId, device } of open) totals.set(poolId, addTotals(totals.get(poolId) ?? noTotals, totalsOf(device)))
    return totals
  }

  /** The pool is gone. */
  forget(poolId: string): void {
    this.#closed.delete(poolId)
  }
}
