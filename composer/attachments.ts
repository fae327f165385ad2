/**
 * Attachments: which resources are to be reachable, and keeping them so.
 *
 * Rules:
 * - A row of the catalog is the truth. It is committed after the device is open and before `attach` returns; it is deleted
 *   after the clients are gone and the device is closed, before `detach` returns. A crash in between leaves the volume
 *   attached (detach) or detached (attach), and nobody was told otherwise.
 * - At start every attached resource is opened and exported again, `reopenParallelMax` at a time. One that cannot be opened
 *   harms no other: it is in error, its export suspended; retryable errors are tried again.
 * - The first attachment of a resource is exported under the id of the resource, so that its URI never changes; one more with
 *   other options (`shared`) under its own id. Several connections of one attachment are normal.
 * - After a failed sync (I6) new clients are refused, the old ones disconnected, and when none is left the device is closed
 *   and opened again from its journal.
 * - Homes that share a catalog each have attachments of their own, which name their sockets. Those of another home are not served
 *   here: its daemon takes them up when it is active again, unless the resource was attached or detached here meanwhile. Until then the
 *   resource is in use.
 * - The services change an attachment only while they hold the resource's key of `ResourceLocks`.
 */
import {
  AtollError,
  isAtollError,
  toAtollError,
  type AttachmentProtocol,
  type AttachmentRow,
  type Catalog,
  type Clock,
  type Logger,
  type NewId,
  type ResourceRow,
} from '@atoll/core'
import type { Mapper, OpenEvent } from '@atoll/mapper'
import { boundedParallel } from './bounded-parallel.ts'
import { EarlierStates } from './earlier-states.ts'
import type { Exports } from './exports.ts'
import type { KeyedLock } from './keyed-lock.ts'
import type { DeviceHold, OpenDevices } from './open-devices.ts'
import { delay, type SetTimer } from './timers.ts'

/** At start this many resources are opened at a time. */
export const reopenParallelMax = 16
/** Attachments of one resource. */
export const attachmentsPerResourceMax = 16
const reopenDelayFirstMs = 1000
const reopenDelayMaxMs = 30_000

export interface AttachOptions {
  /** Default nbd. */
  protocol?: AttachmentProtocol
  /** Default false; snapshots and images are always read-only. */
  readOnly?: boolean
  /** Default false. True: may stand beside an attachment with other options. */
  shared?: boolean
}

/** An attachment as it is shown. */
export interface AttachmentView {
  id: string
  protocol: AttachmentProtocol
  readOnly: boolean
  shared: boolean
  /** What clients ask the server for. */
  exportName: string
  /** Path of the unix socket. */
  socketPath: string
  uri: string
  /** Clients connected now. */
  connections: number
  createdAt: number
}

/** A resource that has attachments. */
interface Attached {
  resource: ResourceRow
  /** In the order they were made. */
  rows: AttachmentRow[]
  /** null: not open. */
  hold: DeviceHold | null
  /** Why it is not open. */
  error: AtollError | null
  /** Aborted when the attempts to open it again are to end. */
  reopening: AbortController | null
}

export interface AttachmentsOptions {
  catalog: Catalog
  mapper: Pick<Mapper, 'snapshotMap'>
  devices: OpenDevices
  exports: Exports
  /** Shared with the services: one change of a resource at a time. */
  locks: KeyedLock
  log: Logger
  clock: Clock
  setTimer: SetTimer
  newId: NewId
  nbdSocketPath: string
  /** What the attachments of this home carry. */
  homeKey: string
}

export class Attachments {
  private readonly catalog: Catalog
  private readonly mapper: Pick<Mapper, 'snapshotMap'>
  private readonly devices: OpenDevices
  private readonly exports: Exports
  private readonly locks: KeyedLock
  private readonly log: Logger
  private readonly clock: Clock
  private readonly setTimer: SetTimer
  private readonly newId: NewId
  private readonly nbdSocketPath: string
  private readonly homeKey: string
  /** Resources that are attached in other homes, and in which. */
  private readonly elsewhere = new Map<string, string>()
  private readonly attached = new Map<string, Attached>()
  private readonly background = new Set<Promise<void>>()
  private closing = false

  constructor(options: AttachmentsOptions) {
    this.catalog = options.catalog
    this.mapper = options.mapper
    this.devices = options.devices
    this.exports = options.exports
    this.locks = options.locks
    this.log = options.log
    this.clock = options.clock
    this.setTimer = options.setTimer
    this.newId = options.newId
    this.nbdSocketPath = options.nbdSocketPath
    this.homeKey = options.homeKey
  }

  /** Opens and exports everything that is attached. Returns when every one was tried; failures are shown, not thrown. */
  async start(): Promise<void> {
    await this.adopt()
    const all = await this.catalog.db.selectFrom('attachments').selectAll().orderBy('created_at').orderBy('id').execute()
    const rows = all.filter(({ home }) => home === this.homeKey)
    for (const row of all) if (row.home !== this.homeKey) this.elsewhere.set(row.volume_id, row.home ?? '')
    if (this.elsewhere.size > 0)
      this.log.info({ resourceIds: [...this.elsewhere.keys()] }, 'what is attached in other homes is not served here')
    const byResource = Map.groupBy(rows, (row) => row.volume_id)
    const resources = await this.catalog.db
      .selectFrom('resources')
      .selectAll()
      .where('id', 'in', (query) => query.selectFrom('attachments').select('volume_id').where('home', '=', this.homeKey))
      .execute()
    await boundedParallel(resources, reopenParallelMax, async (resource) => {
      const entry: Attached = { resource, rows: byResource.get(resource.id) ?? [], hold: null, error: null, reopening: null }
      this.attached.set(resource.id, entry)
      for (const row of entry.rows) this.exports.publish(this.definitionOf(entry, row), null)
      await this.locks.run(resource.id, () => this.tryOpen(entry))
      if (entry.error?.retryable) this.openAgainLater(entry)
    })
  }

  isAttached(resourceId: string): boolean {
    return this.attached.has(resourceId) || this.elsewhere.has(resourceId)
  }

  /** Ids of all attached resources. */
  resourceIds(): string[] {
    return [...this.attached.keys()]
  }

  /** Why an attached resource is not open at the moment; null if it is, or is not attached. */
  errorOf(resourceId: string): AtollError | null {
    return this.attached.get(resourceId)?.error ?? null
  }

  viewsOf(resourceId: string): AttachmentView[] {
    const entry = this.attached.get(resourceId)
    return entry === undefined ? [] : entry.rows.map((row) => this.viewOf(entry, row))
  }

  /**
   * Makes the resource reachable. With the options of an attachment that is there, nothing changes and it is returned.
   * The caller holds the resource's lock.
   * @throws AtollError VOLUME_IN_USE, SNAPSHOT_IN_USE, IMAGE_IN_USE attached with other options and not `shared`;
   *   ARGUMENT_INVALID; what opening throws
   */
  async attach(resource: ResourceRow, options: AttachOptions = {}): Promise<AttachmentView> {
    if (this.closing) throw new AtollError('COMPOSER_CLOSED', 'the daemon is stopping')
    const wanted = wantedOptions(resource, options)
    const entry = this.attached.get(resource.id)
    const same = entry?.rows.find((row) => hasOptions(row, wanted))
    if (entry !== undefined && same !== undefined) {
      // Idempotent, and the way to try at once what could not be opened.
      if (entry.hold === null) {
        entry.reopening?.abort()
        entry.reopening = null
        await this.openOrThrow(entry)
      }
      return this.viewOf(entry, same)
    }
    if (entry !== undefined && !wanted.shared) throw attachedOtherwise(entry)
    if (entry !== undefined && entry.rows.length >= attachmentsPerResourceMax) {
      throw new AtollError('VOLUME_IN_USE', `${resource.kind} ${resource.name} has ${entry.rows.length} attachments, the limit`, {
        values: { id: resource.id, limit: attachmentsPerResourceMax },
      })
    }
    return await this.add(entry ?? { resource, rows: [], hold: null, error: null, reopening: null }, wanted)
  }

  /**
   * Ends every attachment of the resource: requests in flight are finished, clients disconnected, the device closed.
   * The caller holds the resource's lock.
   * @throws AtollError NOT_ATTACHED; what closing throws: the volume stays attached then
   */
  async detach(resource: ResourceRow): Promise<void> {
    const entry = this.attached.get(resource.id)
    if (entry === undefined && this.elsewhere.has(resource.id)) {
      // Nobody is connected: the daemon of that home is not active.
      await this.removeRows(resource.id)
      return
    }
    if (entry === undefined) {
      throw new AtollError('NOT_ATTACHED', `${resource.kind} ${resource.name} is not attached`, { values: { id: resource.id } })
    }
    entry.reopening?.abort()
    this.exports.suspend(resource.id)
    await this.exports.disconnect(resource.id, 'drain')
    try {
      await this.flushWithReserve(entry)
    } catch (error) {
      // Out of space, say: what clients wrote is kept, and they may come back until there is some.
      if (entry.hold !== null) this.exports.resume(resource.id, entry.hold.device)
      throw error
    }
    await this.letGo(entry)
    entry.hold = null
    await this.removeRows(resource.id)
    for (const row of entry.rows) this.exports.withdraw(this.exportNameOf(entry, row))
    this.attached.delete(resource.id)
    this.log.info({ resourceId: resource.id, name: resource.name }, 'detached')
  }

  /** The pool was opened only now: what lies in it need not wait for its next attempt. */
  poolOpened(poolId: string): void {
    for (const entry of this.attached.values()) {
      if (entry.resource.home_pool_id !== poolId || entry.hold !== null || entry.error?.retryable !== true) continue
      entry.reopening?.abort()
      entry.reopening = null
      this.openAgainLater(entry)
    }
  }

  /** The resource was given another name. */
  rename(resourceId: string, name: string): void {
    const entry = this.attached.get(resourceId)
    if (entry === undefined) return
    entry.resource = { ...entry.resource, name }
    this.exports.rename(resourceId, name, descriptionOf(entry.resource))
  }

  /** Disconnects every client and closes every device; the rows stay, so that the next start exports them again. */
  async close(): Promise<void> {
    this.closing = true
    for (const entry of this.attached.values()) entry.reopening?.abort()
    await Promise.allSettled(this.background)
    await boundedParallel([...this.attached.values()], reopenParallelMax, async (entry) => {
      await this.locks.run(entry.resource.id, async () => {
        this.exports.suspend(entry.resource.id)
        await this.exports.disconnect(entry.resource.id, 'drain')
        await this.letGo(entry)
      })
    })
  }

  /** Rows of an Atoll that had one home only are this one's. */
  private async adopt(): Promise<void> {
    const strange = await this.catalog.db.selectFrom('attachments').select('id').where('home', 'is', null).limit(1).execute()
    if (strange.length === 0) return
    await this.catalog.write(
      async (tx) => void (await tx.updateTable('attachments').set({ home: this.homeKey }).where('home', 'is', null).execute()),
      { emergency: true },
    )
  }

  private async removeRows(resourceId: string): Promise<void> {
    // A detach leads to a delete, so it goes through on a full disk.
    await this.catalog.write(
      async (tx) => void (await tx.deleteFrom('attachments').where('volume_id', '=', resourceId).execute()),
      { emergency: true },
    )
    this.elsewhere.delete(resourceId)
  }

  private async add(entry: Attached, wanted: WantedOptions): Promise<AttachmentView> {
    const { resource } = entry
    const isFirst = entry.rows.length === 0
    const row: AttachmentRow = {
      id: this.newId(),
      project_id: resource.project_id,
      volume_id: resource.id,
      protocol: wanted.protocol,
      read_only: wanted.readOnly,
      shared: wanted.shared,
      options: {},
      created_at: this.clock.nowMs(),
      home: this.homeKey,
    }
    if (isFirst) await this.openOrThrow(entry)
    try {
      await this.catalog.write(async (tx) => {
        // What other homes made of the resource ends here: from now on this one has it.
        await tx.deleteFrom('attachments').where('volume_id', '=', resource.id).where('home', '!=', this.homeKey).execute()
        await tx.insertInto('attachments').values(row).execute()
      })
      this.elsewhere.delete(resource.id)
    } catch (error) {
      if (isFirst) await entry.hold?.release()
      throw error
    }
    this.attached.set(resource.id, entry)
    entry.rows.push(row)
    this.exports.publish(this.definitionOf(entry, row), entry.hold?.device ?? null)
    this.log.info(
      { resourceId: resource.id, name: resource.name, export: this.exportNameOf(entry, row), readOnly: row.read_only },
      'attached',
    )
    // Poisoned between the open and here: the table did not have it yet.
    if (entry.hold?.device.isPoisoned() === true) {
      this.deviceFailed(entry, { kind: 'poisoned', resourceId: resource.id, message: 'a sync failed' })
    }
    return this.viewOf(entry, row)
  }

  /** Opens the device and takes clients. */
  private async openOrThrow(entry: Attached): Promise<void> {
    const hold = await this.devices.acquire(entry.resource, (event) => this.deviceFailed(entry, event))
    entry.hold = hold
    entry.error = null
    this.exports.resume(entry.resource.id, hold.device)
  }

  private async tryOpen(entry: Attached): Promise<void> {
    try {
      await this.openOrThrow(entry)
    } catch (error) {
      entry.error = toAtollError(error)
      this.log.error(
        { err: error, resourceId: entry.resource.id, name: entry.resource.name },
        'an attached resource could not be opened',
      )
    }
  }

  /**
   * I6, I1: the device is of no use any more. Called at most once for each time it was opened; the rest happens in the
   * background. A lost lease is not taken back: whoever has it writes now.
   */
  private deviceFailed(entry: Attached, event: OpenEvent): void {
    const { resource } = entry
    if (this.closing || this.attached.get(resource.id) !== entry) return
    this.log.error(
      { resourceId: resource.id, name: resource.name, event: event.kind, reason: event.message },
      'an open device failed: its clients are disconnected',
    )
    const code = event.kind === 'lease-lost' ? 'LEASE_LOST' : 'DEVICE_POISONED'
    entry.error = new AtollError(code, `${resource.kind} ${resource.name}: ${event.message}`, {
      values: { id: resource.id },
      retryable: event.kind !== 'lease-lost',
    })
    this.exports.suspend(resource.id)
    this.openAgainLater(entry)
  }

  /** Tries until the device is open, the resource is detached or the daemon stops. */
  private openAgainLater(entry: Attached): void {
    if (this.closing || entry.reopening !== null) return
    const controller = new AbortController()
    entry.reopening = controller
    const done = this.openAgain(entry, controller.signal)
      .catch((error: unknown) =>
        this.log.error({ err: error, resourceId: entry.resource.id }, 'opening a device again was given up'),
      )
      .finally(() => {
        if (entry.reopening === controller) entry.reopening = null
        this.background.delete(done)
      })
    this.background.add(done)
  }

  private async openAgain(entry: Attached, signal: AbortSignal): Promise<void> {
    const { resource } = entry
    let delayMs = reopenDelayFirstMs
    if (entry.hold === null) await delay(this.setTimer, delayMs, signal)
    while (!signal.aborted) {
      await this.locks.run(resource.id, async () => {
        // A detach or an attach may have been faster.
        if (signal.aborted || this.attached.get(resource.id) !== entry) return
        await this.exports.disconnect(resource.id, 'close')
        await this.letGo(entry)
        if (entry.hold === null && entry.error?.code !== 'LEASE_LOST') await this.tryOpen(entry)
      })
      if (signal.aborted) return
      if (entry.error === null || !entry.error.retryable) {
        // Set here, without a pause, so that a poison that comes now starts anew.
        entry.reopening = null
        if (entry.error === null) this.log.info({ resourceId: resource.id, name: resource.name }, 'the device is open again')
        return
      }
      await delay(this.setTimer, delayMs, signal)
      delayMs = Math.min(delayMs * 2, reopenDelayMaxMs)
    }
  }

  /** A detach leads to a delete, so on a full disk the journal gets what the pool keeps back. */
  private async flushWithReserve(entry: Attached): Promise<void> {
    try {
      await flushBeforeClose(entry)
    } catch (error) {
      if (!isAtollError(error, 'NO_SPACE')) throw error
      await this.devices.releaseReserve(entry.resource)
      await flushBeforeClose(entry)
    }
  }

  /** Closes the device. Closed with an error it is closed all the same: what was flushed is in the journal for the next open. */
  private async letGo(entry: Attached): Promise<void> {
    if (entry.hold === null) return
    try {
      await entry.hold.release()
    } catch (error) {
      this.log.warn({ err: error, resourceId: entry.resource.id }, 'a device was closed with an error')
    }
    entry.hold = null
  }

  private exportNameOf(entry: Attached, row: AttachmentRow): string {
    return entry.rows[0] === undefined || entry.rows[0].id === row.id ? entry.resource.id : row.id
  }

  private definitionOf(entry: Attached, row: AttachmentRow): Parameters<Exports['publish']>[0] {
    return {
      id: this.exportNameOf(entry, row),
      resourceId: entry.resource.id,
      name: entry.resource.name,
      description: descriptionOf(entry.resource),
      readOnly: row.read_only,
      changes: new EarlierStates(this.catalog, this.mapper, entry.resource),
    }
  }

  private viewOf(entry: Attached, row: AttachmentRow): AttachmentView {
    const exportName = this.exportNameOf(entry, row)
    return {
      id: row.id,
      protocol: row.protocol,
      readOnly: row.read_only,
      shared: row.shared,
      exportName,
      socketPath: this.nbdSocketPath,
      uri: nbdUnixUri(exportName, this.nbdSocketPath),
      connections: this.exports.get(exportName)?.connections.size ?? 0,
      createdAt: row.created_at,
    }
  }
}

/** `nbd+unix:///EXPORT?socket=PATH`, with what has a meaning in a URI escaped. */
export function nbdUnixUri(exportName: string, socketPath: string): string {
  const escapedPath = encodeURIComponent(socketPath).replaceAll('%2F', '/')
  return `nbd+unix:///${encodeURIComponent(exportName)}?socket=${escapedPath}`
}

/** A poisoned device has nothing more to flush (I6), one that is read-only never had. */
async function flushBeforeClose({ hold }: Attached): Promise<void> {
  if (hold === null || hold.device.readOnly() || hold.device.isPoisoned()) return
  try {
    await hold.device.flush()
  } catch (error) {
    if (!hold.device.isPoisoned()) throw error
  }
}

interface WantedOptions {
  protocol: AttachmentProtocol
  readOnly: boolean
  shared: boolean
}

function wantedOptions(resource: ResourceRow, options: AttachOptions): WantedOptions {
  const protocol = options.protocol ?? 'nbd'
  if (protocol !== 'nbd') {
    throw new AtollError('ARGUMENT_INVALID', `the protocol ${JSON.stringify(protocol)} is not served; use nbd`, {
      values: { protocol },
    })
  }
  return { protocol, readOnly: resource.kind !== 'volume' || (options.readOnly ?? false), shared: options.shared ?? false }
}

function hasOptions(row: AttachmentRow, wanted: WantedOptions): boolean {
  return row.protocol === wanted.protocol && row.read_only === wanted.readOnly && row.shared === wanted.shared
}

function attachedOtherwise({ resource, rows }: Attached): AtollError {
  const how = rows
    .map((row) => [row.protocol, row.read_only ? 'read-only' : 'writable', ...(row.shared ? ['shared'] : [])].join(' '))
    .join('; ')
  const code = resource.kind === 'snapshot' ? 'SNAPSHOT_IN_USE' : resource.kind === 'image' ? 'IMAGE_IN_USE' : 'VOLUME_IN_USE'
  return new AtollError(
    code,
    `${resource.kind} ${resource.name} is attached with other options (${how}): detach it first, or attach it shared`,
    {
      values: { id: resource.id, attachedAs: how },
    },
  )
}

function descriptionOf(resource: ResourceRow): string {
  return `${resource.kind} ${resource.name}`
}
