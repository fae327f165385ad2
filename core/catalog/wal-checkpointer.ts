/**
 * Keeps the write-ahead log short without any commit paying for it.
 *
 * The log grows with every commit; when `startFrames` of it are not folded into the file yet, the worker thread folds them
 * (PASSIVE: beside running commits). SQLite writes from the log's beginning again only when a commit finds everything
 * folded. Under writes that never pause that moment would not come by itself, so beyond `longFrames` the rest is folded while
 * writes are held back, as soon as it is small or the log reaches `heldFrames`; and from then on bulk writers are paced: each
 * waits for the thread. Nobody blocks the event loop.
 */
import { setImmediate as nextTurn } from 'node:timers/promises'
import { Worker } from 'node:worker_threads'
import type Database from 'better-sqlite3'
import type { Mutex } from '../mutex.ts'

/** 4 KiB each: fold from 4 MiB on. */
const startFrames = 1024
/** 32 MiB: force the log back to its beginning. */
const longFrames = 8192
/** Hold writes only if no more than this is left: 2 MiB, a few milliseconds. */
const holdFrames = 512
/** 48 MiB: hold writes whatever is left, because they outrun the thread. */
const heldFrames = 12_288
/** The log's file is cut back to this when it starts again; one large transaction may make it longer. */
export const logFileBytesMax = 64 * 2 ** 20

interface PassResult {
  logFrames: number
  foldedFrames: number
}

export class WalCheckpointer {
  readonly #path: string
  readonly #mutex: Mutex
  readonly #state: Database.Statement
  readonly #onError: (message: string) => void
  #worker: Worker | undefined
  #running: Promise<void> | undefined
  #pending: { resolve: (result: PassResult) => void; reject: (error: Error) => void } | undefined
  #logFrames = 0
  #closed = false

  /**
   * @param database the catalog's own connection, asked for the log's length after commits
   * @param mutex the catalog's write mutex
   * @param onError told when a pass failed; the log then only grows, and the next commit tries again
   */
  constructor(path: string, database: Database.Database, mutex: Mutex, onError: (message: string) => void) {
    this.#path = path
    this.#mutex = mutex
    this.#onError = onError
    // NOOP only reports; it takes no lock and writes nothing.
    this.#state = database.prepare('pragma wal_checkpoint(NOOP)')
  }

  /** Called after each commit; returns at once. */
  afterCommit(): void {
    if (this.#closed) return
    const { log, checkpointed } = this.#state.get() as { log: number; checkpointed: number }
    this.#logFrames = log
    if (this.#running !== undefined || log - checkpointed < startFrames) return
    this.#running = this.#fold()
      .catch((error: unknown) => this.#onError(error instanceof Error ? error.message : String(error)))
      .finally(() => {
        this.#running = undefined
      })
  }

  /** Where a bulk writer waits after its commit: until the log is not too long, and in any case one turn of the event loop. */
  async pace(): Promise<void> {
    if (this.#logFrames >= heldFrames && this.#running !== undefined) await this.#running
    else await nextTurn()
  }

  /** Waits for the pass that is running and ends the thread. */
  async close(): Promise<void> {
    this.#closed = true
    await this.#running
    const worker = this.#worker
    if (worker === undefined) return
    worker.ref()
    const exited = new Promise<void>((resolve) => worker.once('exit', () => resolve()))
    worker.postMessage('close')
    await exited
    this.#worker = undefined
  }

  async #fold(): Promise<void> {
    let result = await this.#pass()
    if (result.logFrames < longFrames) return
    while (result.logFrames < heldFrames && result.logFrames - result.foldedFrames > holdFrames && !this.#closed) {
      result = await this.#pass()
    }
    // Everything may be folded by now; this pass makes sure that nothing came in between, so that the next commit starts over.
    if (!this.#closed) await this.#mutex.run(() => this.#pass())
  }

  #pass(): Promise<PassResult> {
    const worker = (this.#worker ??= this.#start())
    return new Promise((resolve, reject) => {
      this.#pending = { resolve, reject }
      // It keeps the process alive only while somebody waits for it.
      worker.ref()
      worker.postMessage('checkpoint')
    })
  }

  #start(): Worker {
    const worker = new Worker(new URL('./wal-checkpoint-worker.ts', import.meta.url), {
      workerData: { path: this.#path },
      resourceLimits: { maxOldGenerationSizeMb: 32, maxYoungGenerationSizeMb: 4 },
    })
    const fail = (error: Error): void => {
      if (this.#worker === worker) this.#worker = undefined
      this.#pending?.reject(error)
      this.#pending = undefined
    }
    worker.on('message', (message: PassResult | { error: string }) => {
      worker.unref()
      if ('error' in message) this.#pending?.reject(new Error(message.error))
      else this.#pending?.resolve(message)
      this.#pending = undefined
    })
    worker.on('error', fail)
    worker.on('exit', () => fail(new Error('the thread that folds the write-ahead log ended')))
    return worker
  }
}
