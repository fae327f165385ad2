/**
 * Reading a pool's export: the newest whole base, and the deltas that follow it without a gap.
 *
 * Rules:
 * - Bytes of records are hostile (I7): each is checked by `decodeRecord`. What is damaged or missing is named, and what can be
 *   known without it is known all the same.
 * - Deltas are put together by the changes that they say they follow on: a delta that follows on more than what was reached
 *   means that one is missing. It is applied all the same, and whatever was not confirmed after the gap is uncertain.
 * - A base without its last record was never finished; then the one before it is still there.
 * - Records of another catalog than the base's are left over from an earlier owner and are passed over.
 */
import { type AtollError, exportedTableNames, type ExportedRow, type ExportedTable, keyOfRow, toAtollError } from '@atoll/core'
import type { Store } from '@atoll/native'
import {
  decodeRecord,
  type ExportHeader,
  type ExportRecord,
  parseRecordName,
  type RecordName,
  recordPrefix,
} from './export-format.ts'

/** One thing that is wrong with an export. */
export interface ExportDamage {
  readonly record: string
  readonly message: string
}

export interface LoadedRow {
  readonly row: ExportedRow
  /** Number of the step that brought it: rows of a step before `LoadedExport.uncertainBefore` may be out of date. */
  readonly step: number
}

export interface LoadedExport {
  /** Of the record that was written last. */
  readonly header: ExportHeader
  /** The number of the base, and of the first delta that comes after it; null: there is none that can be read. */
  readonly base: { readonly number: number; readonly deltasFrom: number; readonly partCount: number } | null
  /** All changes up to this one are in it. */
  readonly reachedSeq: number
  /** Number of the last delta record that was applied; 0: none. */
  readonly lastDelta: number
  /** The largest in use. */
  readonly baseNumberMax: number
  readonly deltaNumberMax: number
  readonly deltaBytes: number
  readonly deltaCount: number
  readonly rows: ReadonlyMap<ExportedTable, Map<string, LoadedRow>>
  readonly pages: ReadonlyMap<number, Uint8Array>
  readonly damages: readonly ExportDamage[]
  readonly uncertainBefore: number
  readonly aliasMax: number
  readonly pageIdMax: number
}

export interface LoadOptions {
  /** Default false. True: of a base only its last record is read, and no rows and pages are kept; for whoever goes on writing. */
  readonly chainOnly?: boolean
  /** Default false. True: every record is read, but pages are not kept. */
  readonly rowsOnly?: boolean
}

/** Null if the pool has no export at all. @throws AtollError IO_ERROR if the records cannot be listed, FORMAT_VERSION */
export async function loadExport(store: Store, options: LoadOptions = {}): Promise<LoadedExport | null> {
  const names = (await store.listRecords(recordPrefix)).map(parseRecordName).filter((name) => name !== null)
  if (names.length === 0) return null
  return await new Loader(store, names, options).load()
}

interface FoundBase {
  readonly number: number
  readonly records: readonly RecordName[]
  /** Of its last record, if that is there and sound. */
  readonly last: ExportHeader | null
}

class Loader {
  readonly #store: Store
  readonly #names: readonly RecordName[]
  readonly #chainOnly: boolean
  readonly #rowsOnly: boolean
  readonly #rows = new Map<ExportedTable, Map<string, LoadedRow>>(exportedTableNames.map((name) => [name, new Map()]))
  readonly #pages = new Map<number, Uint8Array>()
  readonly #damages: ExportDamage[] = []
  #header: ExportHeader | null = null
  #step = 0
  #uncertainBefore = 0
  #reachedSeq = 0
  #lastDelta = 0
  #deltaBytes = 0
  #deltaCount = 0
  #aliasMax = 0
  #pageIdMax = 0

  constructor(store: Store, names: readonly RecordName[], options: LoadOptions) {
    this.#store = store
    this.#names = names
    this.#chainOnly = options.chainOnly ?? false
    this.#rowsOnly = options.rowsOnly ?? false
  }

  async load(): Promise<LoadedExport | null> {
    const base = await this.#findBase()
    const deltasFrom = base === null ? 0 : await this.#readBase(base)
    await this.#readDeltas(deltasFrom)
    if (base?.last !== null && base !== null && base.last.toSeq > this.#reachedSeq) {
      this.#damage(baseRecord(base), `needs the changes up to ${base.last.toSeq}, but the deltas end at ${this.#reachedSeq}`)
    }
    if (this.#header === null) return null
    const numbers = (kind: RecordName['kind']) => this.#names.filter((name) => name.kind === kind).map((name) => name.number)
    return {
      header: this.#header,
      base: base === null || base.last === null ? null : { number: base.number, deltasFrom, partCount: base.records.length },
      reachedSeq: this.#reachedSeq,
      lastDelta: this.#lastDelta,
      baseNumberMax: Math.max(0, ...numbers('base')),
      deltaNumberMax: numbers('delta').reduce((a, b) => Math.max(a, b), 0),
      deltaBytes: this.#deltaBytes,
      deltaCount: this.#deltaCount,
      rows: this.#rows,
      pages: this.#pages,
      damages: this.#damages,
      uncertainBefore: this.#uncertainBefore,
      aliasMax: this.#aliasMax,
      pageIdMax: this.#pageIdMax,
    }
  }

  /** The newest base that has its last record; failing that, the newest of which anything is there. */
  async #findBase(): Promise<FoundBase | null> {
    const byNumber = Map.groupBy(
      this.#names.filter((name) => name.kind === 'base'),
      (name) => name.number,
    )
    const bases: FoundBase[] = []
    for (const [number, unsorted] of [...byNumber].toSorted(([a], [b]) => b - a)) {
      const records = unsorted.toSorted((a, b) => a.part - b.part)
      const end = records.at(-1) as RecordName
      const record = await this.#read(end, bases.length === 0)
      const base = { number, records, last: record?.header.last === true ? record.header : null }
      if (base.last !== null) return base
      bases.push(base)
    }
    const [newest] = bases
    if (newest === undefined) {
      this.#damage(`${recordPrefix}base`, 'is missing: only what changed since it was written is known')
      return null
    }
    this.#damage(baseRecord(newest), 'has no last record: it was never finished, or its end is lost')
    return newest
  }

  /** Returns the number of the first delta after it. */
  async #readBase(base: FoundBase): Promise<number> {
    let deltasFrom = base.last?.deltasFrom ?? 0
    if (base.last !== null) this.#reachedSeq = base.last.fromSeq
    for (let part = 0; part <= (base.records.at(-1)?.part ?? -1); part += 1) {
      const name = base.records.find((record) => record.part === part)
      if (name === undefined) {
        this.#damage(baseRecord(base), `lacks its record ${part}: the rows and pages in it are known only if they changed since`)
        continue
      }
      if (this.#chainOnly && name !== base.records.at(-1)) continue
      const record = await this.#read(name)
      if (record === null) continue
      deltasFrom = record.header.deltasFrom
      this.#apply(record)
    }
    this.#step += 1
    return deltasFrom
  }

  async #readDeltas(from: number): Promise<void> {
    const names = this.#names.filter((name) => name.kind === 'delta' && name.number >= from)
    let group: ExportRecord[] = []
    for (const name of names.toSorted((a, b) => a.number - b.number)) {
      const record = await this.#read(name)
      if (record === null) {
        this.#becomeUncertain()
        group = []
        continue
      }
      const { header } = record
      if (this.#header !== null && header.catalogId !== this.#header.catalogId) continue
      // A delta whose writing failed half-way is followed by one that has everything that it had.
      if (group[0]?.header.part !== header.part) group = []
      group.push(record)
      if (!header.last || header.number - header.part + 1 !== group.length) continue
      if (header.fromSeq > this.#reachedSeq) {
        this.#damage(
          name.name,
          `follows on change ${header.fromSeq}, but the one before it ends at ${this.#reachedSeq}: records are missing`,
        )
        this.#becomeUncertain()
      }
      for (const part of group) this.#apply(part)
      group = []
      this.#step += 1
      this.#reachedSeq = Math.max(this.#reachedSeq, header.toSeq)
      this.#lastDelta = header.number
    }
  }

  async #read(name: RecordName, report = true): Promise<ExportRecord | null> {
    try {
      const bytes = await this.#store.readRecord(name.name)
      if (bytes === null) return null
      const record = decodeRecord(name.name, bytes)
      const { header } = record
      const part = name.kind === 'base' ? header.part : 0
      if (header.kind !== name.kind || header.number !== name.number || part !== name.part) {
        this.#damage(name.name, 'is another record than its name says')
        return null
      }
      if (name.kind === 'delta') {
        this.#deltaBytes += bytes.length
        this.#deltaCount += 1
      }
      return record
    } catch (error) {
      const known: AtollError = toAtollError(error)
      if (known.code === 'FORMAT_VERSION') throw known
      if (report) this.#damage(name.name, known.message)
      return null
    }
  }

  #apply({ header, upserts, deletes, pages }: ExportRecord): void {
    this.#header = header
    this.#aliasMax = Math.max(this.#aliasMax, header.aliasMax)
    this.#pageIdMax = Math.max(this.#pageIdMax, header.pageIdMax)
    if (this.#chainOnly) return
    for (const [table, keys] of Object.entries(deletes) as [ExportedTable, (string | number)[]][]) {
      for (const key of keys) {
        this.#rows.get(table)?.delete(String(key))
        // What goes with its resource has no note of its own.
        if (table === 'resources') for (const more of ['volumes', 'files'] as const) this.#rows.get(more)?.delete(String(key))
      }
    }
    for (const [table, rows] of Object.entries(upserts) as [ExportedTable, ExportedRow[]][]) {
      for (const row of rows) this.#rows.get(table)?.set(String(keyOfRow(table, row)), { row, step: this.#step })
    }
    if (this.#rowsOnly) return
    for (const page of pages) this.#pages.set(page.id, page.body)
  }

  /** What is known so far may have been changed or deleted by what is missing. */
  #becomeUncertain(): void {
    this.#step += 1
    this.#uncertainBefore = this.#step
  }

  #damage(record: string, message: string): void {
    if (!this.#damages.some((damage) => damage.record === record && damage.message === message))
      this.#damages.push({ record, message })
  }
}

function baseRecord(base: FoundBase): string {
  return `${recordPrefix}base.${String(base.number).padStart(12, '0')}`
}
