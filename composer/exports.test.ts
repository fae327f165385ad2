import { silentLog } from '@atoll/core'
import type { Device } from '@atoll/native'
import { beforeEach, describe, expect, test } from 'vitest'
import { connectionsPerExportMax, Exports, type ExportConnection, type ExportEntry } from './exports.ts'

const deviceOf = (sizeBytes: number): Device => ({ sizeBytes: () => sizeBytes }) as unknown as Device
const definition = { id: 'e1', resourceId: 'r1', name: 'disk', description: 'volume disk', readOnly: false }

/** A client that leaves when it is told to, unless it hangs. */
class Client implements ExportConnection {
  readonly peer = 'client'
  readonly calls: string[] = []
  readonly #leave: () => void
  readonly #hangsIn: string

  constructor(leave: (client: Client) => void, hangsIn = '') {
    this.#leave = () => leave(this)
    this.#hangsIn = hangsIn
  }
  async drain(): Promise<void> {
    this.calls.push('drain')
    if (this.#hangsIn === 'drain') await new Promise(() => undefined)
    this.#leave()
  }
  async close(): Promise<void> {
    this.calls.push('close')
    if (this.#hangsIn !== 'leave') this.#leave()
  }
}

describe('the table of exports', () => {
  let exports: Exports
  let expire: (() => void)[]
  beforeEach(() => {
    expire = []
    exports = new Exports({
      log: silentLog(),
      setTimer: (callback) => {
        expire.push(callback)
        return () => undefined
      },
    })
    exports.publish(definition, deviceOf(4096))
  })

  const entryOf = (id: string): ExportEntry => {
    const entry = exports.get(id)
    if (entry === null) throw new Error(`no export ${id}`)
    return entry
  }

  test('shows what is published and follows the size of the device', () => {
    expect(exports.list().map(({ id }) => id)).toEqual(['e1'])
    expect(entryOf('e1')).toMatchObject({ name: 'disk', readOnly: false, sizeBytes: 4096 })
    expect(exports.get('e2')).toBeNull()
    exports.rename('r1', 'renamed', 'volume renamed')
    expect(entryOf('e1').name).toBe('renamed')
    exports.withdraw('e1')
    expect(exports.list()).toEqual([])
  })

  test('refuses clients while it is suspended, and takes them again on the new device', () => {
    const entry = entryOf('e1')
    exports.suspend('r1')
    expect(exports.get('e1')).toBeNull()
    expect(exports.isSuspended('e1')).toBe(true)
    expect(exports.isSuspended('e2')).toBe(false)
    expect(() => exports.enter(entry, new Client(() => undefined))).toThrow(expect.objectContaining({ code: 'EXPORT_GONE' }))
    exports.resume('r1', deviceOf(8192))
    exports.enter(entry, new Client(() => undefined))
    expect(entry.sizeBytes).toBe(8192)
  })

  test('a client that negotiated with a withdrawn export is refused, also when it was published again', () => {
    const entry = entryOf('e1')
    exports.withdraw('e1')
    exports.publish(definition, deviceOf(4096))
    expect(() => exports.enter(entry, new Client(() => undefined))).toThrow(expect.objectContaining({ code: 'EXPORT_GONE' }))
  })

  test('takes only so many connections of one export', () => {
    for (let count = 0; count < connectionsPerExportMax; count++) exports.enter(entryOf('e1'), new Client(() => undefined))
    expect(exports.connectionCount('r1')).toBe(connectionsPerExportMax)
    expect(() => exports.enter(entryOf('e1'), new Client(() => undefined))).toThrow(/connections already/)
  })

  test('drains every client and returns when all have left', async () => {
    const entry = entryOf('e1')
    const clients = [1, 2].map(() => new Client((client) => exports.leave(entry, client)))
    for (const client of clients) exports.enter(entry, client)
    exports.suspend('r1')
    await exports.disconnect('r1', 'drain')
    expect(entry.connections.size).toBe(0)
    expect(clients.map(({ calls }) => calls)).toEqual([
      ['drain', 'close'],
      ['drain', 'close'],
    ])
    await exports.disconnect('r1', 'drain')
  })

  test('cuts off a client whose requests do not finish in time', async () => {
    const entry = entryOf('e1')
    const client = new Client((self) => exports.leave(entry, self), 'drain')
    exports.enter(entry, client)
    exports.suspend('r1')
    const done = exports.disconnect('r1', 'drain')
    for (const callback of expire) callback()
    await done
    expect(client.calls).toEqual(['drain', 'close'])
  })

  test('does not wait for ever for a connection that never leaves', async () => {
    const entry = entryOf('e1')
    const client = new Client(() => undefined, 'leave')
    exports.enter(entry, client)
    const done = exports.disconnect('r1', 'close')
    while (client.calls.length === 0) await Promise.resolve()
    while (expire.length === 0) await Promise.resolve()
    for (const callback of expire) callback()
    await done
    expect(entry.connections.size).toBe(0)
  })
})
