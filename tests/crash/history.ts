/**
 * A long run of random operations over the recorder, and after each operation every state that a power cut at any of its
 * sync boundaries and catalog commits could have left: replayed, opened, compared with what is possible.
 *
 * Stores and catalog form one ordered history: a state is the first k commits and everything synced up to one moment, plus
 * a random subset of what was not synced (dropped, reordered, torn). Commits that were asked for without durability may be
 * taken back by the state, newest first.
 */
import { adminProject, openCatalog, silentLog } from '@atoll/core'
import { openMapper, type FileTarget, type Mapper } from '@atoll/mapper'
import { type Device, Engine, type Store } from '@atoll/native'
import { checkCrashState } from './crash-state.ts'
import { givenStoreDriver, type RecordSwitch } from './given-store-driver.ts'
import { Model, type ModelResource } from './model.ts'
import { PossibleContent } from './possible-content.ts'
import { Random } from './random.ts'
import { recordCommits, type RecordedCommit, type RecordingCatalog } from './recording-catalog.ts'

export interface HistoryOptions {
  readonly seed: number
  readonly operationCount: number
  /** Random subsets for each boundary. */
  readonly drawsPerBoundary: number
  /** Check only boundaries with (number % parts) == part: several processes share one history. */
  readonly part: number
  readonly parts: number
  /** Check nothing before this operation: to come back to a failure quickly. */
  readonly fromOperation: number
  /** Default false. True: files are put, replaced and given up, too. */
  readonly files?: boolean
  readonly onProgress?: (progress: HistoryReport) => void
}

export interface HistoryReport {
  operations: number
  boundaries: number
  states: number
  /** How often each operation ran. */
  byOperation: Record<string, number>
}

const slotBytes = 4096
const volumeSlotsMax = 24
const volumesMax = 3
const snapshotsMax = 4
const filesMax = 4
/** Percent of the operations, where there are files. */
const fileOperations = 15
const fileBytesMax = 6 * slotBytes
/** One in so many states is also reclaimed, and one in so many lives on. */
const reclaimEvery = 13
const liveEvery = 11
/** In one of so many the catalog is lost. */
const importEvery = 3
const statesAtOnce = 5
/** Of the moments after an operation without a sync or a commit, one in so many is looked at. */
const quietMomentEvery = 4

export async function runHistory(options: HistoryOptions): Promise<HistoryReport> {
  const engine = new Engine()
  const store = engine.memoryStore({ capacityBytes: 1 << 30, record: true })
  const inner = await openCatalog(':memory:')
  const recording = recordCommits(inner, store)
  const records: RecordSwitch = { areFailing: false }
  const mapper = await openMapper({
    catalog: recording.catalog,
    engine,
    drivers: [givenStoreDriver(store, records)],
    log: silentLog(),
    setTimer: () => () => {},
  })
  try {
    const history = new History(options, store, recording, mapper, records)
    await history.run()
    return history.report
  } finally {
    await mapper.close()
    await inner.close()
    await engine.close()
  }
}

class History {
  readonly report: HistoryReport = { operations: 0, boundaries: 0, states: 0, byOperation: {} }
  readonly #options: HistoryOptions
  readonly #random: Random
  readonly #store: Store
  readonly #recording: RecordingCatalog
  readonly #mapper: Mapper
  readonly #records: RecordSwitch
  readonly #model = new Model()
  readonly #ids = new Map<string, string>()
  readonly #devices = new Map<string, Device>()
  #nextName = 1
  #stamp = 1
  #poolId = ''
  /** Commits that a state may begin with: the last durable one before the boundary, and those after it. */
  #commits: RecordedCommit[] = []
  #checkedSequence = 0
  /** While the export cannot be written: what it had before. */
  #exported: Model | undefined

  constructor(options: HistoryOptions, store: Store, recording: RecordingCatalog, mapper: Mapper, records: RecordSwitch) {
    this.#options = options
    this.#random = new Random(options.seed)
    this.#store = store
    this.#recording = recording
    this.#mapper = mapper
    this.#records = records
  }

  async run(): Promise<void> {
    const pool = await this.#mapper.pools.create({ projectId: adminProject.id, name: 'crash', driver: 'memory', options: {} })
    this.#poolId = pool.id
    this.#commits = [await this.#recording.first()]
    this.#recording.take()
    this.#checkedSequence = this.#store.sequence()
    for (let index = 0; index < this.#options.operationCount; index++) {
      const operation = this.#pickOperation()
      this.report.byOperation[operation] = (this.report.byOperation[operation] ?? 0) + 1
      await this.#perform(operation)
      this.report.operations++
      if (index % 500 === 499) this.#options.onProgress?.(this.report)
    }
  }

  #pickOperation(): string {
    const volumes = this.#model.of('volume')
    const snapshots = this.#model.of('snapshot')
    if (volumes.length === 0) return 'create'
    if (this.#options.files === true && this.#random.chance(fileOperations)) return this.#pickFileOperation()
    const roll = this.#random.below(1000)
    if (roll < 690) return 'write'
    if (roll < 730) return 'discard'
    if (roll < 770) return 'zero'
    if (roll < 885) return 'flush'
    if (roll < 900) return 'checkpoint'
    if (roll < 920) return snapshots.length < snapshotsMax ? 'snapshot' : 'delete-snapshot'
    if (roll < 926) return volumes.length < volumesMax ? 'create' : 'delete-volume'
    if (roll < 940) return volumes.length < volumesMax ? 'clone' : 'delete-volume'
    if (roll < 952) return 'resize'
    if (roll < 959) return snapshots.length > 0 ? 'rollback' : 'flush'
    if (roll < 970) return snapshots.length > 0 ? 'delete-snapshot' : 'flush'
    if (roll < 974) return volumes.length > 1 ? 'delete-volume' : 'flush'
    if (roll < 986) return 'reopen'
    if (roll < 990) return snapshots.length > 0 ? 'reclaim-unexported' : 'reclaim'
    return 'reclaim'
  }

  #pickFileOperation(): string {
    const files = this.#model.of('file')
    if (files.length === 0) return 'put-file'
    if (files.length >= filesMax) return this.#random.pick(['replace-file', 'delete-file'])
    return this.#random.pick([
      'put-file',
      'put-file',
      'replace-file',
      'abort-file',
      'file-of-volume',
      'clone-file',
      'delete-file',
    ])
  }

  async #perform(operation: string): Promise<void> {
    switch (operation) {
      case 'write':
      case 'discard':
      case 'zero':
        return this.#mutate(operation)
      case 'flush':
        return this.#flush()
      case 'checkpoint':
        return this.#checkpoint()
      case 'snapshot':
        return this.#snapshot()
      case 'create':
        return this.#create()
      case 'clone':
        return this.#clone()
      case 'resize':
        return this.#resize()
      case 'rollback':
        return this.#rollback()
      case 'delete-snapshot':
        return this.#delete(this.#random.pick(this.#model.of('snapshot')))
      case 'delete-volume':
        return this.#deleteVolume()
      case 'put-file':
        return this.#putFile(null)
      case 'replace-file':
        return this.#putFile(this.#random.pick(this.#model.of('file')))
      case 'abort-file':
        return this.#abortFile()
      case 'file-of-volume':
        return this.#shareAsFile(this.#pickVolume())
      case 'clone-file':
        return this.#shareAsFile(this.#random.pick(this.#model.of('file')))
      case 'delete-file':
        return this.#delete(this.#random.pick(this.#model.of('file')))
      case 'reopen':
        return this.#reopen()
      case 'reclaim':
        return this.#reclaim()
      case 'reclaim-unexported':
        return this.#reclaimUnexported()
      default:
        throw new Error(`no operation ${operation}`)
    }
  }

  #id(name: string): string {
    const id = this.#ids.get(name)
    if (id === undefined) throw new Error(`no id of ${name}`)
    return id
  }

  #newName(kind: string): string {
    return `${kind}-${this.#nextName++}`
  }

  async #device(name: string): Promise<Device> {
    const known = this.#devices.get(name)
    if (known !== undefined) return known
    const opened = await this.#mapper.open(this.#id(name), { holder: 'history', readOnly: false })
    this.#devices.set(name, opened.device)
    return opened.device
  }

  /** A close is a flush; the moments inside it are of the time before. */
  async #closeDevice(name: string): Promise<void> {
    if (!this.#devices.delete(name)) return
    await this.#mapper.close(this.#id(name))
    await this.#examine(`close ${name}`)
    this.#model.content(name).flushed()
  }

  #pickVolume(): ModelResource {
    return this.#random.pick(this.#model.of('volume'))
  }

  async #mutate(kind: 'write' | 'discard' | 'zero'): Promise<void> {
    const volume = this.#pickVolume()
    const device = await this.#device(volume.name)
    const content = this.#model.content(volume.name)
    let offset = this.#random.below(content.sizeBytes)
    let length = Math.min(1 + this.#random.below(3 * slotBytes), content.sizeBytes - offset)
    if (kind === 'discard' || this.#random.chance(50)) {
      offset -= offset % slotBytes
      length = Math.min(Math.ceil(length / slotBytes) * slotBytes, content.sizeBytes - offset)
    }
    const data = Buffer.alloc(length)
    if (kind === 'write') this.#fill(data, offset)
    content.write(offset, data)
    if (kind === 'write') await device.write(offset, data)
    else if (kind === 'discard') await device.discard(offset, length)
    else await device.writeZeroes(offset, length, this.#random.chance(30))
    await this.#examine(`${kind} ${volume.name} ${offset}+${length}`)
  }

  /** Every word of a write carries its number, so that two writes never look alike. */
  #fill(data: Buffer, offset: number): void {
    const stamp = this.#stamp++
    const word = Buffer.alloc(4)
    word.writeUInt32LE(stamp)
    for (let at = 0; at < data.length; at++) data[at] = word[(offset + at) % 4] ?? 0
  }

  async #flush(): Promise<void> {
    const volume = this.#pickVolume()
    const device = await this.#device(volume.name)
    await device.flush()
    // Before the answer everything since the last flush was possible; the boundaries inside the flush are of that time.
    await this.#examine(`flush ${volume.name}`)
    this.#model.content(volume.name).flushed()
  }

  async #checkpoint(): Promise<void> {
    const volume = this.#pickVolume()
    await this.#device(volume.name)
    await this.#mapper.checkpoint(this.#id(volume.name))
    // No flush is promised: where the map has not changed, there is nothing to checkpoint.
    await this.#examine(`checkpoint ${volume.name}`)
  }

  async #snapshot(): Promise<void> {
    const count = Math.min(this.#random.chance(25) ? 2 : 1, this.#model.of('volume').length)
    const volumes = this.#shuffled(this.#model.of('volume')).slice(0, count)
    for (const volume of volumes) {
      if (this.#random.chance(70)) await this.#device(volume.name)
      else await this.#closeDevice(volume.name)
    }
    const items = volumes.map((volume) => ({ volumeId: this.#id(volume.name), name: this.#newName('snapshot') }))
    const made = items.map((item, index) => {
      const volume = volumes[index]
      if (volume === undefined) throw new Error('no volume')
      return this.#model.add({
        name: item.name,
        kind: 'snapshot',
        contents: [new PossibleContent(this.#model.content(volume.name).current)],
        uncertain: true,
        open: false,
        volumeName: volume.name,
      })
    })
    // While the snapshot is taken, flushed writes go on: some land behind the swap and before its commit.
    const writing = volumes.map((volume, index) => this.#writeMeanwhile(volume, made[index] ?? null))
    const [{ rows }] = await Promise.all([this.#mapper.snapshot(items), ...writing])
    for (const row of rows) this.#ids.set(row.name, row.id)
    await this.#examine(`snapshot ${items.map((item) => item.name).join(' ')}`)
    for (const snapshot of made) await this.#settleSnapshot(snapshot)
    // A snapshot is a flush of its volume.
    for (const volume of volumes) this.#model.content(volume.name).flushed()
  }

  /** A snapshot that is being taken may have any of the states that its volume goes through. */
  async #writeMeanwhile(volume: ModelResource, snapshot: ModelResource | null): Promise<void> {
    const device = this.#devices.get(volume.name)
    if (device === undefined || this.#random.chance(30)) return
    const content = this.#model.content(volume.name)
    const slots = Array.from({ length: 6 }, () => this.#random.below(content.sizeBytes / slotBytes))
    for (const slot of slots) {
      const data = Buffer.alloc(slotBytes)
      this.#fill(data, slot * slotBytes)
      content.write(slot * slotBytes, data)
      snapshot?.contents.push(new PossibleContent(content.current))
      await device.write(slot * slotBytes, data)
      await device.flush()
      content.markFlushed(this.#store.sequence())
    }
  }

  /** Which of the possible states the snapshot has; from now on it is that one. */
  async #settleSnapshot(snapshot: ModelResource): Promise<void> {
    const { device } = await this.#mapper.open(this.#id(snapshot.name), { holder: 'history', readOnly: true })
    const found = Buffer.from(await device.read(0, device.sizeBytes()))
    await this.#mapper.close(this.#id(snapshot.name))
    const settled = snapshot.contents.find((content) => content.findImpossible(found, this.#store.sequence()) === null)
    if (settled === undefined) throw new Error(`snapshot ${snapshot.name} has a state that its volume never had`)
    snapshot.contents = [settled]
    snapshot.uncertain = false
  }

  async #create(): Promise<void> {
    const name = this.#newName('volume')
    const sizeBytes = this.#random.between(1, volumeSlotsMax) * slotBytes
    const volume = this.#model.add({
      name,
      kind: 'volume',
      contents: [new PossibleContent(Buffer.alloc(sizeBytes))],
      uncertain: true,
      open: false,
      volumeName: null,
    })
    const row = await this.#mapper.createVolume({ projectId: adminProject.id, name, sizeBytes, poolId: this.#poolId })
    this.#ids.set(name, row.id)
    await this.#examine(`create ${name}`)
    volume.uncertain = false
  }

  async #clone(): Promise<void> {
    const source = this.#random.pick([...this.#model.of('volume'), ...this.#model.of('snapshot')])
    if (source.kind === 'volume' && this.#random.chance(70)) await this.#device(source.name)
    const content = this.#model.content(source.name)
    const name = this.#newName('volume')
    const sizeBytes = content.sizeBytes + this.#random.below(3) * slotBytes
    const cloned = Buffer.alloc(sizeBytes)
    content.current.copy(cloned)
    const volume = this.#model.add({
      name,
      kind: 'volume',
      contents: [new PossibleContent(cloned)],
      uncertain: true,
      open: false,
      volumeName: null,
    })
    const row = await this.#mapper.createVolume({
      projectId: adminProject.id,
      name,
      sizeBytes,
      poolId: this.#poolId,
      fromId: this.#id(source.name),
    })
    this.#ids.set(name, row.id)
    await this.#examine(`clone ${source.name} to ${name}`)
    volume.uncertain = false
    if (source.kind === 'volume') content.flushed()
  }

  async #resize(): Promise<void> {
    const volume = this.#pickVolume()
    const old = this.#model.content(volume.name)
    const sizeBytes = this.#random.between(1, volumeSlotsMax) * slotBytes
    if (sizeBytes >= old.sizeBytes && this.#random.chance(60)) await this.#device(volume.name)
    if (sizeBytes < old.sizeBytes) await this.#closeDevice(volume.name)
    const next = old.copy()
    next.resize(sizeBytes)
    if (sizeBytes >= old.sizeBytes) {
      // Growing flushes nothing: what was possible stays possible, at the new size.
      volume.contents = [old, grown(old, sizeBytes)]
    } else {
      volume.contents = [old, next]
    }
    await this.#mapper.resize(this.#id(volume.name), sizeBytes)
    await this.#examine(`resize ${volume.name} ${old.sizeBytes} -> ${sizeBytes}`)
    volume.contents = volume.contents.slice(1)
  }

  async #rollback(): Promise<void> {
    const snapshot = this.#random.pick(this.#model.of('snapshot'))
    const volume = snapshot.volumeName === null ? undefined : this.#model.resources.get(snapshot.volumeName)
    if (volume === undefined) return this.#flush()
    await this.#closeDevice(volume.name)
    volume.contents.push(new PossibleContent(this.#model.content(snapshot.name).current))
    await this.#mapper.rollback(this.#id(volume.name), this.#id(snapshot.name))
    await this.#examine(`rollback ${volume.name} to ${snapshot.name}`)
    volume.contents = volume.contents.slice(1)
  }

  async #delete(resource: ModelResource): Promise<void> {
    resource.uncertain = true
    await this.#mapper.deleteResource(this.#id(resource.name))
    await this.#examine(`delete ${resource.name}`)
    this.#model.resources.delete(resource.name)
    // From the commit on it must not come back.
    await this.#examine(`deleted ${resource.name}`, true)
  }

  async #deleteVolume(): Promise<void> {
    const volume = this.#pickVolume()
    await this.#closeDevice(volume.name)
    for (const snapshot of this.#model.of('snapshot')) {
      if (snapshot.volumeName === volume.name) await this.#delete(snapshot)
    }
    await this.#delete(volume)
  }

  async #reopen(): Promise<void> {
    const volume = this.#pickVolume()
    if (this.#devices.has(volume.name)) return this.#closeDevice(volume.name)
    await this.#device(volume.name)
    await this.#examine(`open ${volume.name}`)
  }

  /** Writes go on meanwhile: what was written since its checkpoint is in no durable root. */
  async #reclaim(): Promise<void> {
    const writing = this.#model.of('volume').map((volume) => this.#writeMeanwhile(volume, null))
    await Promise.all([this.#mapper.reclaim(null), ...writing])
    await this.#examine('reclaim')
  }

  /** A file is there with all of its bytes, or not at all; what it replaces goes exactly then. */
  async #putFile(old: ModelResource | null): Promise<void> {
    const { file, target, sizeBytes } = await this.#writeFile()
    if (old !== null) {
      old.uncertain = true
      this.#model.exactlyOneOf = [old.name, file.name]
    }
    const row = await this.#mapper.finishFile(target, sizeBytes, {
      mayDrop: old === null ? [] : [this.#id(old.name)],
      write: async (_tx, _file, drop) => {
        if (old !== null) await drop(this.#id(old.name))
      },
    })
    this.#ids.set(file.name, row.id)
    await this.#examine(`put ${file.name}${old === null ? '' : ` in the place of ${old.name}`}`)
    file.uncertain = false
    this.#model.exactlyOneOf = []
    if (old !== null) this.#model.resources.delete(old.name)
    await this.#examine(`have put ${file.name}`, true)
  }

  async #abortFile(): Promise<void> {
    const { file, target } = await this.#writeFile()
    // From the beginning on it must not be there.
    this.#model.resources.delete(file.name)
    await this.#mapper.abortFile(target)
    await this.#examine(`abort ${file.name}`)
  }

  async #writeFile(): Promise<{ file: ModelResource; target: FileTarget; sizeBytes: number }> {
    const name = this.#newName('file')
    const sizeBytes = this.#random.between(1, fileBytesMax)
    const data = Buffer.alloc(sizeBytes)
    this.#fill(data, 0)
    const file = this.#model.add({
      name,
      kind: 'file',
      contents: [new PossibleContent(data)],
      uncertain: true,
      open: false,
      volumeName: null,
    })
    const target = await this.#mapper.beginFile({ projectId: adminProject.id, name, poolId: this.#poolId })
    for (let at = 0; at < sizeBytes;) {
      const length = Math.min(this.#random.between(1, 2 * slotBytes), sizeBytes - at)
      await target.device.write(at, data.subarray(at, at + length))
      at += length
      if (this.#random.chance(20)) await target.device.flush()
    }
    return { file, target, sizeBytes }
  }

  async #shareAsFile(source: ModelResource): Promise<void> {
    if (source.kind === 'volume' && this.#random.chance(70)) await this.#device(source.name)
    const content = this.#model.content(source.name)
    const name = this.#newName('file')
    const file = this.#model.add({
      name,
      kind: 'file',
      contents: [new PossibleContent(content.current)],
      uncertain: true,
      open: false,
      volumeName: null,
    })
    const wanted = { projectId: adminProject.id, name, poolId: this.#poolId }
    const row = await this.#mapper.createFile(wanted, this.#id(source.name), { mayDrop: [], write: async () => undefined })
    this.#ids.set(name, row.id)
    await this.#examine(`share ${source.name} as ${name}`)
    file.uncertain = false
    if (source.kind === 'volume') content.flushed()
  }

  /** A delete and a reclaim while the export cannot be written: what it names must stay, since the catalog may be lost just then. */
  async #reclaimUnexported(): Promise<void> {
    await this.#mapper.flushExports([this.#poolId])
    await this.#examine('flush of the export')
    const exported = new Model()
    for (const snapshot of this.#model.of('snapshot')) exported.add({ ...snapshot, contents: [...snapshot.contents] })
    this.#exported = exported
    this.#records.areFailing = true
    await this.#delete(this.#random.pick(this.#model.of('snapshot')))
    await this.#mapper.reclaim(null)
    await this.#examine('reclaim without an export')
    this.#records.areFailing = false
    await this.#mapper.flushExports([this.#poolId])
    this.#exported = undefined
    await this.#examine('flush of the export', true)
  }

  #shuffled<T>(items: readonly T[]): T[] {
    const rest = [...items]
    const out: T[] = []
    while (rest.length > 0) out.push(...rest.splice(this.#random.below(rest.length), 1))
    return out
  }

  /**
   * Looks at every state since the last call. `endOnly`: only the last moment (the model has changed since: what was
   * uncertain is decided).
   */
  async #examine(what: string, endOnly = false): Promise<void> {
    this.#commits.push(...this.#recording.take())
    const end = this.#store.sequence()
    const moments: { sequence: number; commitCount: number }[] = []
    const commitsUpTo = (sequence: number): number => this.#commits.filter((commit) => commit.storeSequence <= sequence).length
    if (!endOnly) {
      for (const boundary of this.#store.boundaries(this.#checkedSequence)) {
        // Just after the event, before any commit that followed it.
        const before = this.#commits.filter((commit) => commit.storeSequence < boundary).length
        moments.push({ sequence: boundary, commitCount: Math.max(before, 1) })
      }
      this.#commits.forEach((commit, index) => {
        if (commit.storeSequence >= this.#checkedSequence)
          moments.push({ sequence: commit.storeSequence, commitCount: index + 1 })
      })
    }
    if (endOnly || moments.length > 0 || this.report.operations % quietMomentEvery === 0) {
      moments.push({ sequence: end, commitCount: commitsUpTo(end) })
    }
    for (const moment of moments) await this.#examineMoment(what, moment)
    this.#checkedSequence = end
    this.#store.forgetBefore(end)
    // Older commits can come back only if a later one is not durable.
    const lastDurable = this.#commits.findLastIndex((commit) => commit.durable)
    this.#commits = this.#commits.slice(Math.max(lastDurable, 0))
  }

  async #examineMoment(what: string, moment: { sequence: number; commitCount: number }): Promise<void> {
    const number = this.report.boundaries++
    if (number % this.#options.parts !== this.#options.part || this.report.operations < this.#options.fromOperation) return
    const commits = this.#commits.slice(0, moment.commitCount)
    const firstPossible = Math.max(
      commits.findLastIndex((commit) => commit.durable),
      0,
    )
    const candidates = commits.slice(firstPossible)
    // Nothing is changed by looking, so several states can be looked at together.
    for (let first = 0; first < this.#options.drawsPerBoundary; first += statesAtOnce) {
      const end = Math.min(first + statesAtOnce, this.#options.drawsPerBoundary)
      await Promise.all(
        Array.from({ length: end - first }, (_, index) =>
          this.#examineDraw(what, moment.sequence, number, candidates, first + index),
        ),
      )
    }
  }

  async #examineDraw(
    what: string,
    sequence: number,
    number: number,
    candidates: readonly RecordedCommit[],
    draw: number,
  ): Promise<void> {
    const seed = this.#options.seed * 1_000_003 + number * 1009 + draw
    const random = new Random(seed)
    const commit = draw === 0 ? candidates[candidates.length - 1] : random.pick(candidates)
    if (commit === undefined) throw new Error('no commit to begin with')
    // The first draws are the extremes: everything survived, nothing did, some did in order.
    const keep = draw === 0 ? 255 : draw === 1 ? 0 : random.pick([32, 96, 128, 160, 224])
    const stateNumber = this.report.states++
    await checkCrashState(
      {
        catalogBytes: commit.bytes,
        sequence,
        exported: this.#exported,
        image: () => this.#store.crashImage(sequence, seed, { keepOf256: keep, tear: draw > 2, reorder: draw > 2 }),
        context: `seed ${this.#options.seed}, operation ${this.report.operations} (${what}), event ${sequence}, commit ${candidates.indexOf(commit) + 1} of ${candidates.length}, draw ${draw}`,
      },
      this.#model,
      {
        reclaim: stateNumber % reclaimEvery === 0,
        live: stateNumber % liveEvery === 0,
        import: stateNumber % importEvery === 0,
      },
    )
  }
}

function grown(old: PossibleContent, sizeBytes: number): PossibleContent {
  const next = old.copy()
  next.grow(sizeBytes)
  return next
}
