/** What the catalog's tests need again and again. */
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { CatalogTransaction } from './catalog.ts'
import { adminProject, type NewResource } from './schema.ts'

/** A new folder, and how to remove it. */
export async function makeTemporaryFolder(): Promise<{ folder: string; remove: () => Promise<void> }> {
  const folder = await mkdtemp(join(tmpdir(), 'atoll-core-'))
  return { folder, remove: () => rm(folder, { recursive: true, force: true }) }
}

export const testPoolId = '10000000-0000-4000-8000-000000000000'

export async function insertPool(tx: CatalogTransaction, name = 'default'): Promise<void> {
  await tx
    .insertInto('pools')
    .values({ id: testPoolId, project_id: adminProject.id, name, driver: 'memory', options: { capacity: '1G' }, created_at: 1 })
    .execute()
}

/** A volume's row without the rows of its layers. */
export function volumeResource(id: string, changes: Partial<NewResource> = {}): NewResource {
  return {
    id,
    project_id: adminProject.id,
    kind: 'volume',
    name: 'disk',
    size_bytes: 4096,
    root_word: 0n,
    root_crc: 0,
    home_pool_id: testPoolId,
    parent_id: null,
    volume_id: null,
    status: 'available',
    created_at: 1,
    updated_at: 1,
    ...changes,
  }
}
