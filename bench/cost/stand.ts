/** Catalog, engine and mapper over a file pool in a scratch directory: what the cost measurements run on. */
import { mkdir, mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { adminProject, type Catalog, openCatalog, silentLog } from '@atoll/core'
import { openMapper, type Mapper } from '@atoll/mapper'
import { Engine } from '@atoll/native'
import { drivers } from '@atoll/southbound'

export interface Stand {
  readonly mapper: Mapper
  readonly engine: Engine
  readonly catalog: Catalog
  readonly poolId: string
  /** Where everything lies. */
  readonly directory: string
  close(): Promise<void>
  /** Everything closed and opened again on the same directory. */
  reopen(): Promise<Stand>
}

/** Opens a stand in a new scratch directory, or in `directory`; `close` removes it. */
export async function openStand(directory?: string): Promise<Stand> {
  const root = directory ?? (await mkdtemp(join(tmpdir(), 'atoll-cost-')))
  const batchLogDirectory = join(root, 'batch-logs')
  await mkdir(batchLogDirectory, { recursive: true })
  const catalog = await openCatalog(join(root, 'catalog.db'))
  const engine = new Engine({ pageFile: join(root, 'pages.cache'), batchLogDirectory })
  const mapper = await openMapper({ catalog, engine, drivers, log: silentLog() })
  const known = await mapper.pools.list()
  const pool =
    known[0] ??
    (await mapper.pools.create({
      projectId: adminProject.id,
      name: 'cost',
      driver: 'file',
      options: { path: join(root, 'pool') },
    }))
  const shut = async (): Promise<void> => {
    await mapper.close()
    await engine.close()
    await catalog.close()
  }
  return {
    mapper,
    engine,
    catalog,
    poolId: pool.id,
    directory: root,
    async close() {
      await shut()
      await rm(root, { recursive: true, force: true })
    },
    async reopen() {
      await shut()
      return await openStand(root)
    },
  }
}

export const MiB = 1024 * 1024
export const GiB = 1024 * MiB
export const TiB = 1024 * GiB
export const leafBytes = 32 * MiB

/** An image of the size with a little data at its start. */
export async function makeImage(stand: Stand, name: string, sizeBytes: number): Promise<string> {
  const target = await stand.mapper.beginImport({
    projectId: adminProject.id,
    name,
    kind: 'image',
    sizeBytes,
    poolId: stand.poolId,
  })
  await target.device.write(0, Buffer.alloc(MiB, 1))
  await stand.mapper.finishImport(target.resourceId)
  return target.resourceId
}

export async function cloneOf(stand: Stand, fromId: string, name: string, sizeBytes: number): Promise<string> {
  const row = await stand.mapper.createVolume({ projectId: adminProject.id, name, sizeBytes, poolId: stand.poolId, fromId })
  return row.id
}

/** Middle, and largest, of some measurements. */
export function spread(values: readonly number[]): { median: number; max: number } {
  const sorted = values.toSorted((a, b) => a - b)
  return { median: sorted[Math.floor(sorted.length / 2)] ?? 0, max: sorted.at(-1) ?? 0 }
}
