/** Bugs planted in the mapper, and the crash histories that must catch each. Every `find` stands exactly once in its file. */
import type { PlantedBug } from './planted-bug.ts'

/** Long enough that every kind of operation happens, with few draws: the bugs are coarse. */
const history = ['--seed', '11', '--operations', '1200', '--draws', '3']
/** With many files in it. */
const fileHistory = ['--files', '--seed', '21', '--operations', '300', '--draws', '4']

const olderCatalog = ['mapper/older-catalog.test.ts']
const moves = ['tests/crash/moves.crash.test.ts']

export const controlPlaneBugs: PlantedBug[] = [
  {
    name: 'a daemon whose catalog was taken over goes on writing it',
    edits: [
      {
        file: 'core/catalog/open-catalog.ts',
        find: '      this.#requireOwner()\n      const result = await this.#scoped',
        replace: '      const result = await this.#scoped',
      },
    ],
    tests: ['core/catalog/catalog-owner.test.ts'],
  },
  {
    name: 'journal segments and frames go before the export has the checkpoint',
    edits: [
      {
        file: 'mapper/checkpoint.ts',
        find: 'const exported = await context.exporter.flushed(parts.flatMap((part) => exportsOf(part)))',
        replace: 'const exported = true',
      },
      {
        file: 'mapper/share.ts',
        find: 'const exported = await context.exporter.flushed(pools)',
        replace: 'const exported = true',
      },
    ],
    tests: history,
  },
  {
    name: 'reclaim punches and removes what an export that cannot be written still names',
    edits: [
      {
        file: 'mapper/reclaim.ts',
        find: 'if (await context.exporter.flushedForPunch(id)) exported.add(id)',
        replace: 'exported.add(id)',
      },
      {
        file: 'mapper/recover.ts',
        find: 'if (rows.length === 0 || !(await context.exporter.flushedForPunch(poolId))) return nothing',
        replace: 'if (rows.length === 0) return nothing',
      },
    ],
    tests: history,
  },
  {
    name: 'reclaim punches a secondary replica by what the primary is needed for',
    edits: [
      {
        file: 'mapper/reclaim.ts',
        find: ' : { only: poolId }',
        replace: ' : { butNot: new Set(complete.filter((other) => other !== primary)) }',
      },
    ],
    tests: ['mapper/replicas.model.test.ts'],
  },
  {
    name: 'reclaim punches the primary replica as if nobody but its own pool read it',
    edits: [
      {
        file: 'mapper/reclaim.ts',
        find: 'return poolId === primary ? { butNot: new Set(complete.filter((other) => other !== primary)) } : { only: poolId }',
        replace: 'return { only: poolId }',
      },
    ],
    tests: ['mapper/replicas.model.test.ts'],
  },
  {
    name: 'a replica goes before the export of the pool has it that is to stand in for it',
    edits: [
      {
        file: 'mapper/recover.ts',
        find: '(await context.exporter.flushed(replicas.elsewhere)) ? [...unneeded, ...replicas.rows] : unneeded',
        replace: '[...unneeded, ...replicas.rows]',
      },
    ],
    tests: ['mapper/replicas.test.ts'],
  },
  {
    name: 'a volume that moves leaves the export of its old pool before that of the new one has it',
    edits: [
      {
        file: 'mapper/exporter.ts',
        find: 'await this.#writeDelta(state, changes, { keepMoved: true })',
        replace: 'await this.#writeDelta(state, changes)',
      },
    ],
    tests: ['mapper/moved-import.test.ts'],
  },
  {
    name: 'a punch waits for no other pool whose volumes read from the layer',
    edits: [
      {
        file: 'mapper/exporter.ts',
        find: 'return await this.flushed([poolId, ...readers.map((pool) => pool.id), ...also])',
        replace: 'return await this.flushed([poolId])',
      },
    ],
    tests: ['mapper/pool-links.test.ts'],
  },
  {
    name: 'a new base of an export is thought to have the pages that only deltas before it had',
    edits: [
      {
        file: 'mapper/exporter.ts',
        find: '      state.treePages.clear()\n      return',
        replace: '      return',
      },
    ],
    tests: ['mapper/pool-links.test.ts'],
  },
  {
    name: 'a link between pools goes although something was made across them meanwhile',
    edits: [
      {
        file: 'mapper/pool-links.ts',
        find: 'if (now.madeCount !== before.madeCount || now.links.length !== before.links.length) return false',
        replace: '',
      },
    ],
    tests: ['mapper/pool-links.test.ts'],
  },
  {
    name: 'a reclaim frees what a pool reads that was not imported yet',
    edits: [
      {
        file: 'mapper/reclaim.ts',
        find: 'if (!isWhollyRead(links, poolId)) continue',
        replace: '',
      },
      {
        file: 'mapper/exporter.ts',
        find: 'if (readers.some((pool) => pool.isAbsent)) return false',
        replace: '',
      },
    ],
    tests: ['mapper/pool-links.test.ts'],
  },
  {
    name: 'a start removes what its row calls condemned, whatever maps name',
    edits: [
      {
        file: 'mapper/recover.ts',
        find: '(await hasJournal(pool, row.id))) asked.push(row)',
        replace: '(await hasJournal(pool, row.id))) continue',
      },
    ],
    tests: ['mapper/recover.test.ts'],
  },
  {
    name: 'a start takes a layer for a spare that its row calls one, whatever maps name',
    edits: [
      {
        file: 'mapper/recover.ts',
        find: "if (written.has(row.alias) || hasLayer(row.alias)) return 'named'",
        replace: "if (written.has(row.alias)) return 'named'",
      },
    ],
    tests: ['mapper/recover.test.ts'],
  },
  {
    name: 'an accepted older catalog serves at the next start what may be gone',
    edits: [
      {
        file: 'mapper/exporter.ts',
        find: 'await catalog.read(async (tx) => await this.#context.olderCatalog.recall(tx, poolId))',
        replace: '',
      },
    ],
    tests: ['mapper/pool-accept.test.ts'],
  },
  {
    name: 'a catalog that was given up goes on where it was when it comes back',
    edits: [{ file: 'mapper/exporter.ts', find: ' + acceptedAhead)', replace: ')' }],
    tests: ['mapper/pool-accept.test.ts'],
  },
  {
    name: 'a pool that is opened late is compared with what the outbox is by then',
    edits: [
      { file: 'mapper/exporter.ts', find: 'found.reachedSeq > Math.min(last, before)', replace: 'found.reachedSeq > last' },
    ],
    tests: ['mapper/exporter.test.ts'],
  },
  {
    name: 'an older catalog serves what a newer one has deleted',
    edits: [
      {
        file: 'mapper/older-catalog.ts',
        find: "if (found === undefined) verdicts[resource.id] = 'deleted'",
        replace: 'if (found === undefined) continue',
      },
    ],
    tests: olderCatalog,
  },
  {
    name: 'an older catalog forgets at a restart what it must not serve',
    edits: [
      {
        file: 'mapper/older-catalog.ts',
        find: '(row === undefined ? {} : JSON.parse(row.value)) as Record<string, Verdict>',
        replace: '(row === undefined ? {} : {}) as Record<string, Verdict>',
      },
    ],
    tests: olderCatalog,
  },
  {
    name: 'a volume that was rolled back in an older catalog is refused again after a restart',
    edits: [
      {
        file: 'mapper/older-catalog.ts',
        find: 'Object.fromEntries([...verdicts].filter(([id]) => id !== row.id))',
        replace: 'Object.fromEntries(verdicts)',
      },
    ],
    tests: olderCatalog,
  },
  {
    name: 'a snapshot lets go of its volumes before their layers are sealed',
    edits: [{ file: 'mapper/share.ts', find: '        await finish()\n', replace: '        void finish()\n' }],
    tests: ['mapper/snapshot.test.ts'],
  },
  {
    name: 'a volume is swapped before the export names its next layer',
    edits: [{ file: 'mapper/share.ts', find: 'if (unnamed.length > 0) {', replace: 'if (unnamed.length < 0) {' }],
    tests: history,
  },
  {
    name: 'the export has what a power cut can still take back from the catalog',
    edits: [
      {
        file: 'mapper/exporter.ts',
        find: '(this.#isDurable ? { value: await fn(tx) } : null)',
        replace: '({ value: await fn(tx) })',
      },
    ],
    tests: history,
  },
  {
    name: 'the pages of a checkpoint are missing in the export',
    edits: [
      {
        file: 'mapper/checkpoint.ts',
        find: 'if (checkpoint.pageCount > 0) await notePages',
        replace: 'if (checkpoint.pageCount < 0) await notePages',
      },
    ],
    tests: history,
  },
  {
    name: 'reclaim does not look at the roots of snapshots',
    edits: [
      {
        file: 'mapper/references.ts',
        find: ".select(columns).orderBy('id')",
        replace: ".select(columns).where('kind', '<>', 'snapshot').orderBy('id')",
      },
    ],
    tests: history,
  },
  {
    name: 'reclaim punches active layers by the durable map instead of the live one',
    edits: [
      {
        file: 'mapper/reclaim.ts',
        find: ".where('layers.state', '=', 'sealed')",
        replace: ".where('layers.state', 'in', ['sealed', 'active'])",
      },
      // Either of the two is enough.
      { file: 'mapper/reclaim.ts', find: 'if (written.has(layer.alias) || replicas', replace: 'if (replicas' },
    ],
    tests: history,
  },
  {
    name: 'the prepared layer is lost: an open does not know it',
    edits: [{ file: 'mapper/open.ts', find: '      next: next.alias,\n', replace: '      next: null,\n' }],
    tests: history,
  },
  {
    name: 'a swap that a crash interrupted is forgotten at open',
    edits: [{ file: 'mapper/open.ts', find: 'swapUncommitted: opened.report.promotedNext', replace: 'swapUncommitted: false' }],
    // It shows only where a crash keeps the swap and drops its commit: more draws of each boundary.
    tests: ['--seed', '12', '--operations', '1200', '--draws', '12'],
  },
  {
    name: 'the root is committed without its lsn',
    edits: [
      { file: 'mapper/checkpoint.ts', find: '      map_lsn: checkpoint.lsn,\n', replace: '      map_lsn: volume.mapLsn,\n' },
    ],
    tests: history,
  },
  {
    name: 'a checkpoint deletes pages that a snapshot shares',
    edits: [
      {
        file: 'mapper/checkpoint.ts',
        find: 'Array.from(staged.replaced).filter((id) => id >= volume.sharedBelowPage)',
        replace: 'Array.from(staged.replaced).filter((id) => id >= 0)',
      },
    ],
    tests: history,
  },
  {
    name: 'a snapshot does not mark the pages of its root as shared',
    edits: [{ file: 'mapper/share.ts', find: '      share: true,\n', replace: '      share: false,\n' }],
    tests: history,
  },
  {
    name: 'a closed volume goes on writing to the layer that its snapshot refers to',
    edits: [
      {
        file: 'mapper/share.ts',
        find: 'if (rootMayReferTo(rootOf(part.row), part.active.alias)) return',
        replace: 'if (part.active.alias < 0) return',
      },
    ],
    tests: history,
  },
  {
    name: 'the size of a shrink is not committed with its map',
    edits: [{ file: 'mapper/checkpoint.ts', find: '...(sizeBytes === null ? {} : { size_bytes: sizeBytes }) })', replace: '})' }],
    tests: history,
  },
  {
    name: 'a next layer that a crash left bytes in is kept as it is',
    edits: [{ file: 'mapper/open.ts', find: '} else if (lease.wasDirty) await replaceUsedNext(context, serve)', replace: '}' }],
    tests: history,
  },
  {
    name: 'a close releases the lease of a volume whose map the catalog lacks',
    edits: [
      {
        file: 'mapper/close.ts',
        find: '  await tryCheckpoint(context, entry)\n  if (entry.orphansPossible',
        replace: '  if (entry.orphansPossible',
      },
      { file: 'mapper/close.ts', find: '    if (!isClean(entry)) await tryCheckpoint(context, entry)\n', replace: '' },
      {
        file: 'mapper/close.ts',
        find: '  if (isClean(entry)) await releaseLease',
        replace: '  if (entry.kind !== null) await releaseLease',
      },
    ],
    tests: history,
  },
  {
    name: 'a file is available before its bytes are durable',
    edits: [
      {
        file: 'mapper/file-target.ts',
        find: "  await device.flush()\n  assert(device.stats().lsn === 0, 'a slot of a file changed its owner')\n  await device.close()\n",
        replace: '',
      },
      {
        file: 'mapper/file-target.ts',
        find: '    await sealFinishedLater(context, row, volume)\n',
        replace: '    await device.close()\n',
      },
    ],
    tests: fileHistory,
  },
  {
    name: 'the row of a file may be lost although its layer was written',
    edits: [
      {
        file: 'mapper/file-target.ts',
        find: '      await insertWritable(context, tx, row, spare, 0)\n    })\n',
        replace: '      await insertWritable(context, tx, row, spare, 0)\n    }, { durable: false })\n',
      },
    ],
    tests: fileHistory,
  },
  {
    name: 'a replaced file goes before the one that takes its place',
    edits: [
      {
        file: 'mapper/file-target.ts',
        find: '    const row = await context.catalog.write(async (tx) => {\n      dropped.length = 0\n      const file = await becomeAvailable',
        replace:
          '    for (const id of rows.mayDrop) await deleteLocked(context, await requireResource(context.catalog.db, id), { withSnapshots: false })\n' +
          '    const row = await context.catalog.write(async (tx) => {\n      dropped.length = 0\n      const file = await becomeAvailable',
      },
    ],
    tests: fileHistory,
  },
  {
    name: 'a replica is read before it is filled',
    edits: [{ file: 'mapper/move-fill.ts', find: "state: 'filling',", replace: "state: 'complete'," }],
    tests: moves,
  },
  {
    name: 'what a move has copied is said to be there before it is',
    edits: [
      {
        file: 'mapper/move-fill.ts',
        find: 'return { cursor: { alias: layer.alias, sourcePoolId, slot }, isDone: false, ...done }',
        replace: 'return { cursor: { alias: layer.alias, sourcePoolId, slot: slot + 4 }, isDone: false, ...done }',
      },
    ],
    tests: moves,
  },
  {
    name: 'the home changes before everything is in the target',
    edits: [
      {
        file: 'mapper/move-fill.ts',
        find: '  for (const { layer } of claimed) {\n',
        replace: '  for (const { layer } of claimed.slice(1)) {\n',
      },
    ],
    tests: moves,
  },
  {
    name: 'what is open goes on reading where it was when its home has changed',
    edits: [
      {
        file: 'mapper/move-home.ts',
        find: 'await swapHandles(context, id, untold.has(id) ? null : [...changed, ...needs.named])',
        replace: 'await swapHandles(context, id, [])',
      },
    ],
    tests: ['mapper/moves.test.ts'],
  },
  {
    name: 'devices read in the target before the home has changed',
    edits: [
      {
        file: 'mapper/move-home.ts',
        find: '    const isDone = await catalog.write(async (tx) => {\n',
        replace:
          '    for (const id of ids) {\n' +
          '      const known = [...(context.open.get(id)?.layers ?? [])]\n' +
          '      const store = pools.handle(targetPoolId).store\n' +
          '      const homes = await layers.homes(known, targetPoolId)\n' +
          '      await context.open.get(id)?.device.addLayers(homes.map((home) => ({ alias: home.alias, id: home.id, store })))\n' +
          '    }\n' +
          '    const isDone = await catalog.write(async (tx) => {\n',
      },
    ],
    tests: ['mapper/moves.test.ts'],
  },
  {
    name: 'a volume is turned to another pool before the exports name its layer there',
    edits: [
      {
        file: 'mapper/move-freeze.ts',
        find: '    await requireExported(context, poolsOf(volume))\n',
        replace: '',
      },
    ],
    tests: ['mapper/move-freeze.test.ts'],
  },
  {
    name: 'who comes into a pool from another finds less there than its source has',
    edits: [
      {
        file: 'mapper/cover.ts',
        find: 'if (readPoolId !== sourcePoolId) await fill(',
        replace: 'if (readPoolId === poolId && readPoolId === sourcePoolId) await fill(',
      },
    ],
    tests: ['mapper/cover.test.ts'],
  },
  {
    name: 'who comes into a pool that is being filled is not counted',
    edits: [
      {
        file: 'mapper/cover.ts',
        find: '  if (marks.length === 0) return []\n',
        replace: '  if (marks.length >= 0) return []\n',
      },
    ],
    tests: ['mapper/cover.test.ts'],
  },
  {
    name: 'a drained pool is left before others read elsewhere what they read there',
    edits: [
      {
        file: 'mapper/move-home.ts',
        find: "      if (!('volumeId' in request)) for (const alias of await takePrimaries(tx, request)) changed.add(alias)\n",
        replace: '',
      },
    ],
    tests: ['mapper/drain.test.ts'],
  },
  {
    name: 'a move says that the home has changed before it has',
    edits: [
      {
        file: 'composer/move-job.ts',
        find: "    await moves.home(request)\n    await enter('drop')",
        replace: "    await enter('drop')\n    await moves.home(request)",
      },
    ],
    tests: ['composer/moves.test.ts'],
  },
  {
    name: 'a move that is cancelled keeps what it has claimed',
    edits: [
      {
        file: 'composer/move-job.ts',
        find: '      await moves.release(requestOf(context))\n',
        replace: '',
      },
    ],
    tests: ['composer/moves.test.ts'],
  },
]
