/**
 * Space kept back beside the catalog for a full disk: a delete has to write before it frees anything. When such a write meets
 * a full disk, the file is made shorter step by step, and made whole again when there is space. In steps, because whoever
 * else writes on that disk takes what is given back and not used at once: one step must not cost the whole reserve.
 */
import { open, rm, stat, truncate } from 'node:fs/promises'
import { randomFillSync } from 'node:crypto'

export const catalogReserveBytes = 16 * 2 ** 20
const chunkBytes = 2 ** 20
/** Given back at a time: several commits of a delete, and little of the reserve. */
const stepBytes = 512 * 1024

export class CatalogReserve {
  readonly #path: string
  readonly #sizeBytes: number

  /** @param catalogPath the catalog's file: `catalog.db` has `catalog.reserve` beside it */
  constructor(catalogPath: string, sizeBytes = catalogReserveBytes) {
    this.#path = `${catalogPath.replace(/\.db$/, '')}.reserve`
    this.#sizeBytes = sizeBytes
  }

  /** Gives one step back to the file system; returns its bytes, 0 if nothing is left. */
  async shrink(): Promise<number> {
    const size = await this.#size()
    const left = Math.max(0, size - stepBytes)
    if (left === 0) await this.release()
    else await truncate(this.#path, left)
    return size - left
  }

  /** Gives all of the space back to the file system. Idempotent. */
  async release(): Promise<void> {
    await rm(this.#path, { force: true })
  }

  /** Makes the reserve whole if there is space for it; else what is left of it stays. Returns its bytes. */
  async restore(): Promise<number> {
    const size = await this.#size()
    if (size === this.#sizeBytes) return size
    const file = await open(this.#path, 'a', 0o600)
    try {
      if (size > this.#sizeBytes) await file.truncate(this.#sizeBytes)
      // Random bytes: a file system that compresses or drops zeros would keep nothing back.
      const chunk = randomFillSync(Buffer.allocUnsafe(Math.min(chunkBytes, this.#sizeBytes)))
      for (let at = size; at < this.#sizeBytes;)
        at += (await file.write(chunk, 0, Math.min(chunk.length, this.#sizeBytes - at))).bytesWritten
      await file.sync()
      return this.#sizeBytes
    } catch (error) {
      const { code } = error as NodeJS.ErrnoException
      if (code !== 'ENOSPC' && code !== 'EDQUOT') throw error
      // A part of it would only take the last space.
      await file.truncate(size)
      return size
    } finally {
      await file.close()
    }
  }

  async #size(): Promise<number> {
    return await stat(this.#path).then(
      (found) => found.size,
      () => 0,
    )
  }
}
