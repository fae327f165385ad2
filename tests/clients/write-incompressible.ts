import { randomFillSync } from 'node:crypto'
import { open } from 'node:fs/promises'

/** Writes a new file of so many MiB without a slot of zeros. */
export async function writeIncompressible(path: string, mebibytes: number): Promise<void> {
  const file = await open(path, 'wx')
  try {
    const part = Buffer.alloc(2 ** 20)
    for (let count = 0; count < mebibytes; count += 1) await file.write(randomFillSync(part))
  } finally {
    await file.close()
  }
}
