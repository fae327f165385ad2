/**
 * A catalog that keeps, for each commit, what a power cut just after it could leave of the catalog, and when it happened in
 * the history of the store: so that commits and syncs form one ordered history.
 */
import type { Catalog, CatalogTransaction, WriteOptions } from '@atoll/core'
import type { Store } from '@atoll/native'

export interface RecordedCommit {
  /** Events of the store with a number up to this one came before the commit. */
  readonly storeSequence: number
  /** False: a power cut may take it back, together with every later one. */
  readonly durable: boolean
  readonly bytes: Uint8Array
}

export interface RecordingCatalog {
  readonly catalog: Catalog
  /** Commits since the last call, in order. */
  take(): RecordedCommit[]
  /** The catalog as it is now. */
  first(): Promise<RecordedCommit>
}

/** `store`: what numbers the history; several stores have their ticks for that. */
export function recordCommits(inner: Catalog, store: Pick<Store, 'sequence'>): RecordingCatalog {
  let commits: RecordedCommit[] = []
  let tail: Promise<unknown> = Promise.resolve()
  const record = async (durable: boolean): Promise<RecordedCommit> => ({
    storeSequence: store.sequence(),
    durable,
    bytes: await inner.serialize(),
  })
  // A write and the copy of what it committed are one step: no other commit may come between.
  const write = <T>(fn: (tx: CatalogTransaction) => Promise<T>, options?: WriteOptions): Promise<T> => {
    const run = tail.then(async () => {
      const result = await inner.write(fn, options)
      commits.push(await record(options?.durable ?? true))
      return result
    })
    tail = run.catch(() => undefined)
    return run
  }
  // Whoever reads a commit and writes what it says elsewhere must not be ahead of its record.
  const read = <T>(fn: (tx: CatalogTransaction) => Promise<T>): Promise<T> => {
    const run = tail.then(async () => await inner.read(fn))
    tail = run.catch(() => undefined)
    return run
  }
  const catalog = new Proxy(inner, {
    get(target, property) {
      if (property === 'write') return write
      if (property === 'read') return read
      const value: unknown = Reflect.get(target, property, target)
      return typeof value === 'function' ? value.bind(target) : value
    },
  })
  return {
    catalog,
    take() {
      const taken = commits
      commits = []
      return taken
    },
    first: () => record(true),
  }
}
