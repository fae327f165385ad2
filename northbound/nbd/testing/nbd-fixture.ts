import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { silentLog } from '@atoll/core'
import { Engine, type Device, type Store } from '@atoll/native'
import { formatNbdUri } from '@atoll/nbd-client'
import { startNbdServer, type NbdServer, type NbdServerOptions } from '../nbd-server.ts'
import type { EarlierStates, ExportConnection, ExportTable, NbdExport } from '../export-table.ts'

export const KiB = 1024
export const MiB = 1024 * 1024

/** How fast the machine is decides nothing: a test that waits for one of these ends sets it itself. */
export const unhurried = { limits: { handshakeTimeoutMs: 300_000 }, drainTimeoutMs: 300_000 } as const

/** Every test device is of another volume; ids need be different, not random. */
let deviceCount = 0

export interface DeviceOptions {
  sizeBytes?: number
  /** Default: layers in memory. */
  store?: Store
  readOnly?: boolean
  /** Every slot is the active layer's from the start: a fresh volume. Default false: every first write changes the map. */
  uniform?: boolean
}

export interface OpenedDevice {
  device: Device
  store: Store
  layerId: string
  volumeId: string
}

/** A table of exports that come and go, which keeps what entered. */
export class TestExports implements ExportTable {
  readonly entries = new Map<string, NbdExport>()
  readonly suspended = new Set<string>()
  readonly connections = new Map<string, Set<ExportConnection>>()

  add(id: string, device: Device, options: { description?: string; readOnly?: boolean; changes?: EarlierStates } = {}): void {
    const { description = '', readOnly = false, changes } = options
    this.entries.set(id, { id, name: id, description, device, readOnly, ...(changes === undefined ? {} : { changes }) })
  }
  get(name: string): NbdExport | null {
    return this.suspended.has(name) ? null : (this.entries.get(name) ?? null)
  }
  isSuspended(name: string): boolean {
    return this.suspended.has(name)
  }
  list(): readonly NbdExport[] {
    return [...this.entries.values()]
  }
  enter(entry: NbdExport, connection: ExportConnection): void {
    const entered = this.connections.get(entry.id) ?? new Set()
    this.connections.set(entry.id, entered.add(connection))
  }
  leave(entry: NbdExport, connection: ExportConnection): void {
    this.connections.get(entry.id)?.delete(connection)
  }
  count(id: string): number {
    return this.connections.get(id)?.size ?? 0
  }
}

/** An engine, devices and a server on a unix socket; `close` ends all of it. */
export class NbdFixture {
  readonly engine = new Engine()
  readonly exports = new TestExports()
  readonly directory: string
  #server: NbdServer | null = null

  private constructor(directory: string) {
    this.directory = directory
  }

  /** Starts a server for one export `disk` of a device in memory, 8 MiB unless told otherwise. */
  static async start(
    options: DeviceOptions & { server?: Partial<NbdServerOptions>; noExport?: boolean } = {},
  ): Promise<NbdFixture> {
    const fixture = new NbdFixture(await mkdtemp(join(tmpdir(), 'atoll-nbd-')))
    try {
      if (!options.noExport) {
        const { device } = await fixture.openDevice(options)
        fixture.exports.add('disk', device, { description: 'a disk' })
      }
      await fixture.startServer(options.server)
    } catch (error) {
      await fixture.close()
      throw error
    }
    return fixture
  }

  get socketPath(): string {
    return join(this.directory, 'nbd.sock')
  }
  get server(): NbdServer {
    if (this.#server === null) throw new Error('no server was started')
    return this.#server
  }
  get target(): { path: string } {
    return { path: this.socketPath }
  }

  /** A path in the fixture's folder, which goes away with it. */
  file(name: string): string {
    return join(this.directory, name)
  }

  uri(exportName = 'disk'): string {
    return formatNbdUri(this.target, exportName)
  }

  async startServer(options: Partial<NbdServerOptions> = {}): Promise<NbdServer> {
    this.#server = await startNbdServer({
      engine: this.engine,
      exports: this.exports,
      log: silentLog(),
      listen: { path: this.socketPath, mode: 0o600 },
      ...unhurried,
      ...options,
    })
    return this.#server
  }

  /** A device of its own layer. */
  async openDevice(options: DeviceOptions = {}): Promise<OpenedDevice> {
    deviceCount += 1
    const number = deviceCount.toString(16).padStart(12, '0')
    const layerId = `10000000-0000-4000-8000-${number}`
    const volumeId = `20000000-0000-4000-8000-${number}`
    const store = options.store ?? this.engine.memoryStore({ capacityBytes: 512 * MiB })
    await store.createLayer(layerId)
    const { device } = await this.engine.openDevice({
      volumeId,
      sizeBytes: options.sizeBytes ?? 8 * MiB,
      epoch: 1,
      map: this.engine.uniformMap(options.uniform ? 1 : 0),
      mapLsn: 0,
      layers: [{ alias: 1, id: layerId, store }],
      active: options.readOnly ? null : 1,
      next: null,
    })
    return { device, store, layerId, volumeId }
  }

  async close(): Promise<void> {
    await this.#server?.close()
    await this.engine.close()
    await rm(this.directory, { recursive: true, force: true })
  }
}
