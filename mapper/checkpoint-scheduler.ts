/**
 * Checkpoints that nobody asked for by name: when a device says that one is due, and for every open volume that has changes
 * older than the interval.
 *
 * Rules: never two at once per volume (its lock), a bounded number at once over all (I8); one that fails is tried again at
 * the next interval; a volume whose lease is lost or whose device is poisoned is left alone.
 */
import type { MapperContext } from './context.ts'
import { checkpointLocked } from './checkpoint.ts'

/** How often open volumes are looked at: what a replay after a crash has to read is about this much. */
export const checkpointIntervalMs = 5000
/** Checkpoints that run at the same time. */
const concurrencyMax = 4

export class CheckpointScheduler {
  readonly #context: MapperContext
  readonly #wanted = new Set<string>()
  readonly #running = new Set<string>()
  #cancelTimer: (() => void) | null = null
  #stopped = false

  constructor(context: MapperContext) {
    this.#context = context
  }

  start(): void {
    if (this.#stopped) return
    this.#cancelTimer = this.#context.setTimer(() => {
      this.#look()
      this.start()
    }, checkpointIntervalMs)
  }

  /** Nothing is started any more; what runs is waited for by `Background.idle`. */
  stop(): void {
    this.#stopped = true
    this.#cancelTimer?.()
    this.#wanted.clear()
  }

  /** A checkpoint of this volume is due. */
  request(volumeId: string): void {
    if (this.#stopped) return
    this.#wanted.add(volumeId)
    this.#next()
  }

  #look(): void {
    for (const volume of this.#context.open.volumes()) {
      if (volume.leaseLost || volume.device.isPoisoned()) continue
      const stats = volume.device.stats()
      const dirty =
        stats.dirtyLeaves > 0 || stats.lsn > volume.mapLsn || volume.swapUncommitted || volume.pendingSizeBytes !== null
      if (dirty) this.request(volume.id)
    }
  }

  #next(): void {
    for (const volumeId of this.#wanted) {
      if (this.#stopped || this.#running.size >= concurrencyMax) return
      // Asked for again while one runs: after it.
      if (this.#running.has(volumeId)) continue
      this.#wanted.delete(volumeId)
      this.#running.add(volumeId)
      this.#context.background.start(`the checkpoint of volume ${volumeId}`, async () => {
        try {
          await this.#run(volumeId)
        } finally {
          this.#running.delete(volumeId)
          this.#next()
        }
      })
    }
  }

  async #run(volumeId: string): Promise<void> {
    const { locks, open } = this.#context
    await locks.run([volumeId], async () => {
      const volume = open.volume(volumeId)
      if (volume === undefined || volume.leaseLost || volume.device.isPoisoned()) return
      await checkpointLocked(this.#context, volume)
    })
  }
}
