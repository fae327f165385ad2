// Whether this daemon is active on its catalog, or stands by while another one is.
//
// Rules:
// - A daemon that stands by has nothing of the catalog open. It looks every second whether the active one is gone, and before each
//   command; then it is active by itself. It takes the place of one that lives only when it is told to (`takeOver`).
// - One that was active never stands by again: when it is taken over it ends, and the next start stands by.
import { AtollError, isAtollError, Mutex, type Logger } from '@atoll/core'
import type { Composer } from '@atoll/composer'
import type { ActiveParts } from './active-parts.ts'

/** How often one that stands by looks whether the active one is gone. */
const lookMs = 1000

export interface OwnershipOptions {
  readonly catalogPath: string
  readonly log: Logger
  readonly open: (options: { takeOver: boolean }) => Promise<ActiveParts>
  /** Called when this daemon has become active, before anybody is answered. */
  readonly onActive: (parts: ActiveParts) => void
  /** @throws AtollError if the volume is where nobody can be shut out: then nothing is taken over */
  readonly checkTakeOver: (volume: string, scope: { project?: string }) => Promise<void>
}

export class Ownership {
  readonly #options: OwnershipOptions
  readonly #mutex = new Mutex()
  #parts: ActiveParts | null = null
  /** Who is active instead. */
  #holder = ''
  #timer: NodeJS.Timeout | undefined
  #lookFailure = ''
  #isClosed = false

  constructor(options: OwnershipOptions) {
    this.#options = options
  }

  /** null: this daemon stands by. */
  get parts(): ActiveParts | null {
    return this.#parts
  }

  /** Who is active; null: this daemon. */
  get holder(): string | null {
    return this.#parts === null ? this.#holder : null
  }

  /** The composer. @throws AtollError CATALOG_HELD naming who is active */
  composer(): Composer {
    if (this.#parts !== null) return this.#parts.composer
    const { catalogPath } = this.#options
    throw new AtollError(
      'CATALOG_HELD',
      `this daemon stands by: the catalog ${catalogPath} is held by ${this.#holder || 'another daemon'}. Ask that one; when it ends, ` +
        'this one takes its place by itself. If it hangs or lost its machine: atoll volume attach NAME --take-over',
      { values: { path: catalogPath, owner: this.#holder } },
    )
  }

  /**
   * Becomes active. @throws AtollError CATALOG_LOCKED naming who is, and what opening throws
   */
  async start(): Promise<void> {
    await this.#mutex.run(async () => this.#open({ takeOver: false }))
  }

  /** Stands by, because of this refusal, until the other one is gone. */
  standBy(refusal: AtollError): void {
    this.#note(refusal)
    this.#options.log.info({ owner: this.#holder, catalog: this.#options.catalogPath }, 'another daemon is active: standing by')
    this.#timer = setInterval(() => void this.#look(), lookMs)
  }

  /** Becomes active if the other one is gone; else nothing happens. @throws AtollError what opening throws */
  async becomeActive(): Promise<void> {
    if (this.#parts !== null) return
    await this.#mutex.run(async () => {
      if (this.#parts !== null) return
      try {
        await this.#open({ takeOver: false })
      } catch (error) {
        if (!isAtollError(error, 'CATALOG_LOCKED')) throw error
        this.#note(error)
      }
    })
  }

  /** Becomes active, if need be although another daemon is: for this volume. @throws AtollError TAKE_OVER_REFUSED and others */
  async takeOver(volume: string, scope: { project?: string }): Promise<void> {
    await this.becomeActive()
    if (this.#parts !== null) return
    await this.#mutex.run(async () => {
      if (this.#parts !== null) return
      await this.#options.checkTakeOver(volume, scope)
      this.#options.log.warn({ owner: this.#holder, volume }, 'the catalog is taken over from a daemon that has not ended')
      await this.#open({ takeOver: true })
    })
  }

  async close(): Promise<void> {
    clearInterval(this.#timer)
    this.#isClosed = true
    await this.#mutex.run(async () => {
      if (this.#parts !== null && !(await this.#parts.close())) throw new AtollError('INTERNAL', 'the log says what failed')
    })
  }

  async #open(options: { takeOver: boolean }): Promise<void> {
    if (this.#isClosed) throw new AtollError('COMPOSER_CLOSED', 'the daemon is stopping')
    const parts = await this.#options.open(options)
    clearInterval(this.#timer)
    this.#parts = parts
    this.#options.onActive(parts)
  }

  async #look(): Promise<void> {
    // The last look, or a command, is still at it.
    if (this.#mutex.isHeld || this.#isClosed) return
    try {
      await this.becomeActive()
      this.#lookFailure = ''
    } catch (error) {
      // Once, not every second.
      const { message } = error as Error
      if (message !== this.#lookFailure && !this.#isClosed)
        this.#options.log.error({ err: error }, 'this daemon cannot take the place of the one that is gone')
      this.#lookFailure = message
    }
  }

  #note(refusal: AtollError): void {
    const { owner } = refusal.values
    if (typeof owner === 'string') this.#holder = owner
  }
}

/**
 * The composer of a daemon that may stand by: what is called of it, and of its services, is looked up when it is called.
 */
export function composerWhenActive(ownership: Pick<Ownership, 'composer'>): Composer {
  const lazy = (find: () => unknown): unknown =>
    new Proxy(() => undefined, {
      get: (_target, name) => {
        // Asked of what only looks whether it is a promise.
        if (name === 'then') return undefined
        return lazy(() => {
          const owner = find() as object
          const value: unknown = Reflect.get(owner, name, owner)
          return typeof value === 'function' ? (value.bind(owner) as unknown) : value
        })
      },
      apply: (_target, _self, args: unknown[]) => (find() as (...args: unknown[]) => unknown)(...args),
    })
  return lazy(() => ownership.composer()) as Composer
}
