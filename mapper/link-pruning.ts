/**
 * Takes links between pools away that no map needs any more: what was made across them is deleted, and a pool that cannot be
 * reached would hold up the other for nothing.
 *
 * Rules:
 * - A link goes only when the maps of all resources of the reader were read and name no layer that they read in the source, and none of
 *   its volumes writes there; when one cannot be read, or names a layer that nobody here knows, all links of the reader stay.
 * - And only when the export of the reader has that state: what it names is not freed before.
 * - Resources that are made meanwhile name what those that were read named (reclaim.ts says why), but for those that are made across
 *   pools: these are counted, and then everything stays.
 */
import { mapBytesMax } from '@atoll/native'
import type { MapperContext } from './context.ts'
import { readWaiting } from './import-waiting.ts'
import { feedReach } from './maps.ts'
import { type Link, readLinks, replaceLinks, sourcesOf } from './pool-links.ts'
import { rootOf } from './root.ts'
import { eachInTurns, inPieces } from './turns.ts'
import { isMapUnreadable } from './usage.ts'

/** Roots whose pages are fetched together. */
const rootsAtOnce = 256

/** @param step called between two pieces of work; a throw ends it, and nothing is changed */
export async function pruneLinks(context: MapperContext, step: () => void): Promise<void> {
  const { catalog, exporter, log, pins } = context
  const before = await readLinks(catalog.db)
  const readers = [...new Set(before.links.map((link) => link.reader))]
  const after: Link[] = []
  const fewer: string[] = []
  await pins.run(async () => {
    for (const reader of readers) {
      const sources = sourcesOf(before, reader).map((pool) => pool.id)
      const named = before.pools.get(reader)?.isAbsent === false ? await poolsNamed(context, reader, step) : null
      // Those that it reads through others are its own from here on: the links of the others may go.
      const kept = named === null ? sources : sources.filter((source) => named.has(source))
      after.push(...kept.map((source) => ({ reader, source })))
      if (kept.length < sources.length) fewer.push(reader)
    }
  })
  if (fewer.length === 0 || !(await exporter.flushed(fewer))) return
  const isReplaced = await catalog.write(async (tx) => await replaceLinks(tx, before, after), { durable: false, emergency: true })
  if (isReplaced) log.info({ readers: fewer, links: after }, 'pools are read by fewer others than before')
}

/** The layers that volumes of a pool write, and are to write next. */
async function writtenIn({ catalog }: MapperContext, poolId: string): Promise<number[]> {
  const rows = await catalog.db
    .selectFrom('volumes')
    .innerJoin('resources', 'resources.id', 'volumes.id')
    .select(['volumes.active_alias', 'volumes.next_alias'])
    .where('resources.home_pool_id', '=', poolId)
    .execute()
  return rows.flatMap((row) => [row.active_alias, row.next_alias].filter((alias) => alias !== null))
}

/** The pools of the layers that a pool's resources read and write; null: not known. */
async function poolsNamed(context: MapperContext, poolId: string, step: () => void): Promise<ReadonlySet<string> | null> {
  const { catalog, engine, layers } = context
  const rows = await catalog.read(async (tx) => {
    const resources = tx.selectFrom('resources').select(['id', 'root_word', 'root_crc']).where('home_pool_id', '=', poolId)
    return await inPieces(
      async (after, limit) => await resources.where('id', '>', after).orderBy('id').limit(limit).execute(),
      (row) => row.id,
      '',
    )
  })
  // Nobody knows what these write before another pool is here.
  if ((await readWaiting(catalog.db)).volumes.some((volume) => volume.poolId === poolId)) return null
  const reach = engine.reach()
  try {
    for (let start = 0; start < rows.length; start += rootsAtOnce) {
      const part = rows.slice(start, start + rootsAtOnce)
      for (const row of part) reach.addRoot(rootOf(row), mapBytesMax)
      await feedReach(context, reach, part[0]?.id ?? '', step)
    }
    // And what its volumes write, of which their maps need not name anything yet.
    const aliases = new Set(await writtenIn(context, poolId))
    await eachInTurns(reach.layers(), (alias) => aliases.add(alias))
    const homes = await layers.homesIfKnown(aliases, poolId)
    return homes.length < aliases.size ? null : new Set(homes.map((home) => home.poolId))
  } catch (error) {
    if (!isMapUnreadable(error)) throw error
    return null
  } finally {
    reach.clear()
  }
}
