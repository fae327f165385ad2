/**
 * What was imported and waits for another pool of the same lost catalog (pool-import.ts): volumes that write into a pool that is not
 * here yet, and snapshots, kept as images meanwhile, whose volume has its home there.
 *
 * Rules:
 * - It is kept in this catalog (table `meta`), in the transactions that bring pools in: what waits is there after a crash, and as long as
 *   it does, the volume's resource is there without a row that says what it writes, so nobody opens it, and no link of its pool is pruned.
 * - Layers that a volume of a pool writes which is not here have their rows as active ones of nobody: nothing touches those.
 */
import { type CatalogTransaction, type ExportedRow } from '@atoll/core'
import { z } from 'zod'

const key = 'import_waiting'

const row = z.record(z.string(), z.json())
const storedSchema = z.object({
  volumes: z.array(z.object({ poolId: z.string(), row })),
  snapshots: z.array(z.object({ id: z.string(), volumeId: z.string(), name: z.string() })),
})

export interface ImportWaiting {
  /** Rows of volumes, and their homes. */
  readonly volumes: readonly { readonly poolId: string; readonly row: ExportedRow }[]
  readonly snapshots: readonly { readonly id: string; readonly volumeId: string; readonly name: string }[]
}

const nothing: ImportWaiting = { volumes: [], snapshots: [] }

export async function readWaiting(tx: CatalogTransaction): Promise<ImportWaiting> {
  const found = await tx.selectFrom('meta').select('value').where('key', '=', key).executeTakeFirst()
  return found === undefined ? nothing : (storedSchema.parse(JSON.parse(found.value)) as ImportWaiting)
}

/** Inside the write that changes what it says. */
export async function writeWaiting(tx: CatalogTransaction, waiting: ImportWaiting): Promise<void> {
  if (waiting.volumes.length + waiting.snapshots.length === 0) {
    await tx.deleteFrom('meta').where('key', '=', key).execute()
    return
  }
  await tx
    .replaceInto('meta')
    .values({ key, value: JSON.stringify(waiting) })
    .execute()
}

/** Whether the volume waits for the pool that it writes into. */
export async function isWaiting(tx: CatalogTransaction, volumeId: string): Promise<boolean> {
  return (await readWaiting(tx)).volumes.some((volume) => volume.row['id'] === volumeId)
}
