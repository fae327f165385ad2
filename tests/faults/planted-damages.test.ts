/**
 * Every damage that is planted here is found by a check and named, only the part of the check that is there for it finds it, and
 * what a repair may put right it does. The mapper runs meanwhile: the damage comes while the home is in use.
 */
import assert from 'node:assert/strict'
import { spawnSync } from 'node:child_process'
import { cp, mkdir, mkdtemp, open, readdir, readFile, rm, truncate, writeFile } from 'node:fs/promises'
import { createRequire } from 'node:module'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { adminProject, openCatalog, silentLog } from '@atoll/core'
import { type CheckFinding, checkSubjects, type CheckSubject, type Mapper, openMapper } from '@atoll/mapper'
import { Engine } from '@atoll/native'
import { drivers } from '@atoll/southbound'
import type Database from 'better-sqlite3'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { repositoryRoot } from '../test-home.ts'
import { mebibyte, pattern, slotBytes } from './broken-home.ts'
import { crc32c } from './crc32c.ts'
import { withoutCheckpoints } from './without-checkpoints.ts'

const Sqlite = createRequire(join(repositoryRoot, 'core', 'package.json'))('better-sqlite3') as typeof Database

const nobody = '00000000-0000-4000-8000-00000000dead'

let folder: string
let home: string
let template: string

/** A home that is in use. */
interface Life extends AsyncDisposable {
  readonly mapper: Mapper
}

async function live(): Promise<Life> {
  const batchLogs = join(home, 'batch-logs')
  await mkdir(batchLogs, { recursive: true })
  const engine = new Engine({ batchLogDirectory: batchLogs })
  const catalog = await openCatalog(join(home, 'catalog.db'), { reserveBytes: 0 })
  const mapper = await openMapper({ catalog, engine, drivers, log: silentLog(), setTimer: withoutCheckpoints })
  // Spares are made in the background: what is looked at is the same each time.
  await mapper.idle()
  return {
    mapper,
    [Symbol.asyncDispose]: async () => {
      await mapper.close()
      await catalog.close()
      await engine.close()
    },
  }
}

/**
 * `disk` has a snapshot, an image and a clone of it, and pages of its own; `dirty` was killed with frames in its journal;
 * `plain` was never shared.
 */
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'atoll-damages-'))
  home = join(folder, 'home')
  template = join(folder, 'template')
  await mkdir(home)
  await using life = await live()
  const { mapper } = life
  const options = { path: join(home, 'pool'), reserve: '0' }
  // How full the disk of this machine is does not matter here.
  const settings = { 'low-space': 'off' }
  const pool = await mapper.pools.create({ projectId: adminProject.id, name: 'default', driver: 'file', options, settings })
  const volume = async (name: string, fromId?: string) => {
    const wanted = { projectId: adminProject.id, name, sizeBytes: 128 * mebibyte, poolId: pool.id }
    return await mapper.createVolume(fromId === undefined ? wanted : { ...wanted, fromId })
  }
  const write = async (id: string, at: readonly number[], seed: number): Promise<void> => {
    const { device } = await mapper.open(id, { holder: 'test', readOnly: false })
    for (const offset of at) {
      await device.write(offset, pattern(seed, slotBytes))
      await device.flush()
    }
  }
  const plain = await volume('plain')
  await write(plain.id, [0], 1)
  const disk = await volume('disk')
  await write(disk.id, [0, 100 * mebibyte], 2)
  await mapper.snapshot([{ volumeId: disk.id, name: 'first' }])
  const device = mapper.opened(disk.id)?.device
  assert(device !== undefined)
  for (const at of [4096, 40 * mebibyte]) await device.write(at, pattern(3, slotBytes))
  const { rows } = await mapper.snapshot([{ volumeId: disk.id, name: 'second' }])
  for (const at of [8192, 70 * mebibyte]) await device.write(at, pattern(4, slotBytes))
  await mapper.createImage({ projectId: adminProject.id, name: 'golden', fromId: rows[0]?.id ?? '' })
  await volume('clone', rows[0]?.id)
  const dirty = await volume('dirty')
  await mapper.snapshot([{ volumeId: dirty.id, name: 'base' }])
  await mapper.close(plain.id)
  await mapper.close(disk.id)
  await write(dirty.id, [0, 8192, 16_384, 24_576], 5)
  await mapper.idle()
  // As a kill leaves it: the volume `dirty` is open.
  copy(home, template)
})
afterAll(async () => await rm(folder, { recursive: true, force: true }))

/** With holes, which Node's own copy would fill. */
function copy(from: string, to: string): void {
  const { status, stderr } = spawnSync('cp', ['-a', '--sparse=always', from, to], { encoding: 'utf8' })
  assert.equal(status, 0, stderr)
}

/** What a damage is planted with. */
class Ground {
  readonly database: Database.Database

  constructor() {
    this.database = new Sqlite(join(home, 'catalog.db'), { timeout: 5000 })
    this.database.pragma('foreign_keys = off')
  }

  sql(statement: string, ...values: unknown[]): void {
    const { changes } = this.database.prepare(statement).run(...values)
    assert(changes > 0, `${statement} changed nothing`)
  }

  value<T = string>(statement: string, ...values: unknown[]): T {
    const found = this.database
      .prepare(statement)
      .pluck()
      .get(...values) as T | undefined
    assert(found !== undefined, `${statement} found nothing`)
    return found
  }

  id(name: string): string {
    return this.value('select id from resources where name = ?', name)
  }

  /** Alias of the layer that a volume writes. */
  active(name: string): number {
    return this.value('select active_alias from volumes where id = ?', this.id(name))
  }

  layerId(alias: number): string {
    return this.value('select id from layers where alias = ?', alias)
  }

  /** Alias of the layer that `disk` wrote between its snapshots: part of the second one, the image, the clone and the volume. */
  middle(): number {
    return this.value("select alias from layers where state = 'sealed' and volume_id = ? and epoch > 0 limit 1", this.id('disk'))
  }

  rootPage(name: string): number {
    return Number(
      BigInt.asUintN(
        60,
        this.database.prepare('select root_word from resources where name = ?').pluck().safeIntegers(true).get(name) as bigint,
      ),
    )
  }

  body(pageId: number): Buffer {
    return this.value<Buffer>('select body from pages where id = ?', pageId)
  }

  layerPath(alias: number): string {
    return join(home, 'pool', 'layers', `${this.layerId(alias)}.layer`)
  }

  async segments(alias: number): Promise<string[]> {
    const names = await readdir(join(home, 'pool', 'journal'))
    const found = names.filter((name) => name.startsWith(this.layerId(alias))).toSorted()
    assert(found.length > 0, `layer ${alias} has no journal`)
    return found.map((name) => join(home, 'pool', 'journal', name))
  }

  async segment(alias: number): Promise<string> {
    return (await this.segments(alias))[0] ?? ''
  }
}

async function flip(path: string, offset: number): Promise<void> {
  const file = await open(path, 'r+')
  const { buffer } = await file.read(Buffer.alloc(1), 0, 1, offset)
  await file.write(Buffer.from([buffer.readUInt8() ^ 1]), 0, 1, offset)
  await file.close()
}

interface Damage {
  readonly what: string
  readonly plant: (ground: Ground) => void | Promise<void>
  /** The part of the check that finds it. */
  readonly by: CheckSubject
  readonly kind: string
  readonly severity: CheckFinding['severity']
  /** Stands in the object or the message; called before the damage is planted. */
  readonly names: (ground: Ground) => readonly (string | number)[]
  /** Default false. True: a repair puts it right. */
  readonly repaired?: boolean
  readonly deep?: boolean
  /** Default false. True: planted before the home is in use, since a start takes what comes later for work under way. */
  readonly isOld?: boolean
}

const leafOf = (ground: Ground): number =>
  ground.value('select max(id) from pages where substr(body, 5, 1) = ?', Buffer.from([0]))

const damages: readonly Damage[] = [
  {
    what: 'a bit of a page is another',
    plant: (ground) => {
      const id = leafOf(ground)
      const body = ground.body(id)
      body[body.length - 1] = (body.at(-1) ?? 0) ^ 1
      ground.sql('update pages set body = ? where id = ?', body, id)
    },
    by: 'maps',
    kind: 'page-corrupt',
    severity: 'error',
    names: (ground) => [`page ${leafOf(ground)}`, 'volume "disk"'],
    repaired: true,
  },
  {
    what: 'a page that several share is cut short',
    plant: (ground) => {
      const id = ground.rootPage('golden')
      ground.sql('update pages set body = ? where id = ?', ground.body(id).subarray(0, -1), id)
    },
    by: 'maps',
    kind: 'page-corrupt',
    severity: 'error',
    names: (ground) => [`page ${ground.rootPage('golden')}`, 'image "golden"', 'volume "clone"', 'snapshot "second"'],
    repaired: true,
  },
  {
    what: 'a page is gone',
    plant: (ground) => ground.sql('delete from pages where id = ?', leafOf(ground)),
    by: 'maps',
    kind: 'page-missing',
    severity: 'error',
    names: (ground) => [`page ${leafOf(ground)}`, 'volume "disk"'],
    repaired: true,
  },
  {
    what: 'a page has the content of another',
    plant: (ground) =>
      ground.sql('update pages set body = ? where id = ?', ground.body(ground.rootPage('disk')), ground.rootPage('golden')),
    by: 'maps',
    kind: 'page-corrupt',
    severity: 'error',
    names: (ground) => [`page ${ground.rootPage('golden')}`],
    repaired: true,
  },
  {
    what: 'a page is of a newer version',
    plant: (ground) => {
      const id = ground.rootPage('disk')
      const body = ground.body(id)
      body[2] = 9
      ground.sql('update pages set body = ? where id = ?', body, id)
      ground.sql("update resources set root_crc = ? where name = 'disk'", crc32c(body))
    },
    by: 'maps',
    kind: 'page-version',
    severity: 'error',
    names: (ground) => [`page ${ground.rootPage('disk')}`, 'version 9'],
  },
  {
    what: 'the checksum of a root is another',
    plant: (ground) => ground.sql("update resources set root_crc = root_crc + 1 where name = 'second'"),
    by: 'maps',
    kind: 'page-corrupt',
    severity: 'error',
    names: (ground) => [`page ${ground.rootPage('second')}`, 'snapshot "second"'],
  },
  {
    what: 'a root is none',
    plant: (ground) => ground.sql("update resources set root_word = ? where name = 'golden'", (3n << 60n) | 5n),
    by: 'maps',
    kind: 'root-invalid',
    severity: 'error',
    names: (ground) => [ground.id('golden'), 'golden'],
  },
  {
    what: 'a page is part of nothing',
    plant: (ground) => ground.sql('insert into pages (id, body) values (?, ?)', nextPage(ground), ground.body(leafOf(ground))),
    by: 'maps',
    kind: 'page-garbage',
    severity: 'note',
    names: (ground) => [`page ${nextPage(ground)}`],
    repaired: true,
    isOld: true,
  },
  {
    what: 'a map names a layer that has no row',
    plant: (ground) => {
      const alias = ground.middle()
      ground.sql('delete from replicas where layer_alias = ?', alias)
      ground.sql('delete from layers where alias = ?', alias)
    },
    by: 'maps',
    kind: 'map-layer-unknown',
    severity: 'error',
    names: (ground) => [`layer ${ground.middle()}`, 'image "golden"', 'volume "disk"'],
  },
  {
    what: 'a layer that maps name is to be removed',
    plant: (ground) => ground.sql("update layers set state = 'condemned' where alias = ?", ground.middle()),
    by: 'maps',
    kind: 'map-layer-condemned',
    severity: 'error',
    names: (ground) => [ground.layerId(ground.middle()), 'image "golden"'],
    repaired: true,
  },
  {
    what: 'a layer that maps name is called a spare',
    plant: (ground) => ground.sql("update layers set state = 'spare' where alias = ?", ground.middle()),
    by: 'maps',
    kind: 'map-layer-unused',
    severity: 'error',
    names: (ground) => [ground.layerId(ground.middle()), 'image "golden"'],
  },
  {
    what: 'an image names a layer that is written',
    plant: (ground) => ground.sql("update layers set state = 'active' where alias = ?", ground.middle()),
    by: 'maps',
    kind: 'map-shares-active',
    severity: 'error',
    names: (ground) => [ground.layerId(ground.middle()), 'image "golden"'],
  },
  {
    what: 'a layer is called written that no volume writes',
    plant: (ground) => ground.sql("update layers set state = 'active' where alias = ?", ground.middle()),
    by: 'references',
    kind: 'layer-of-nobody',
    severity: 'warning',
    names: (ground) => [ground.layerId(ground.middle())],
  },
  {
    what: 'the layer that a volume writes is called sealed',
    plant: (ground) => ground.sql("update layers set state = 'sealed' where alias = ?", ground.active('disk')),
    by: 'references',
    kind: 'layer-state-wrong',
    severity: 'error',
    names: (ground) => [ground.layerId(ground.active('disk')), ground.id('disk')],
  },
  {
    what: 'two volumes name one layer',
    plant: (ground) => ground.sql('update volumes set next_alias = ? where id = ?', ground.active('disk'), ground.id('plain')),
    by: 'references',
    kind: 'layer-shared',
    severity: 'error',
    names: (ground) => [ground.layerId(ground.active('disk')), ground.id('disk'), ground.id('plain')],
  },
  {
    what: 'a layer lies in no pool',
    plant: (ground) => ground.sql('delete from replicas where layer_alias = ?', ground.middle()),
    by: 'references',
    kind: 'replica-missing',
    severity: 'error',
    names: (ground) => [ground.layerId(ground.middle())],
  },
  {
    what: 'a volume has lost the row that says what it writes',
    plant: (ground) => ground.sql('delete from volumes where id = ?', ground.id('plain')),
    by: 'references',
    kind: 'volume-row-missing',
    severity: 'error',
    names: (ground) => [ground.id('plain'), 'plain'],
  },
  {
    what: 'an image has a row that says what it writes',
    plant: (ground) =>
      ground.sql(
        `insert into volumes (id, project_id, active_alias, next_alias, map_lsn, epoch, shared_below_page)
         values (?, ?, (select alias from layers where state = 'spare' and volume_id is null limit 1), null, 0, 0, 0)`,
        ground.id('golden'),
        adminProject.id,
      ),
    by: 'references',
    kind: 'volume-row-extra',
    severity: 'error',
    names: (ground) => [ground.id('golden')],
  },
  {
    what: 'a volume has a size that none can have',
    plant: (ground) => ground.sql("update resources set size_bytes = 4097 where name = 'disk' and kind = 'volume'"),
    by: 'references',
    kind: 'size-invalid',
    severity: 'error',
    names: (ground) => [ground.id('disk'), 4097],
  },
  {
    what: 'the epoch of a volume went back',
    plant: (ground) => ground.sql('update volumes set epoch = 0 where id = ?', ground.id('disk')),
    by: 'references',
    kind: 'epoch-behind',
    severity: 'error',
    names: (ground) => [ground.id('disk')],
  },
  {
    what: 'a lease is of nothing',
    plant: (ground) =>
      ground.sql('insert into leases values (?, ?, ?, 1, 0, null, null, 0)', nobody, adminProject.id, 'somebody'),
    by: 'references',
    kind: 'lease-of-nothing',
    severity: 'warning',
    names: () => [nobody, 'somebody'],
    repaired: true,
  },
  {
    what: 'an attachment is of nothing',
    plant: (ground) =>
      ground.sql("insert into attachments values (?, ?, ?, 'nbd', 0, 0, '{}', 0, null)", nobody, adminProject.id, nobody),
    by: 'references',
    kind: 'attachment-of-nothing',
    severity: 'warning',
    names: () => [nobody],
    repaired: true,
  },
  {
    what: 'a layer is the next one of a volume that does not name it',
    plant: (ground) => ground.sql('update volumes set next_alias = null where id = ?', ground.id('disk')),
    by: 'layers',
    kind: 'layer-stray',
    severity: 'warning',
    names: (ground) => [
      ground.value('select id from layers where alias = (select next_alias from volumes where id = ?)', ground.id('disk')),
    ],
    repaired: true,
  },
  {
    what: 'pages are recorded of a checkpoint that does not run',
    plant: (ground) => ground.sql('insert into page_ranges values (900000, 900010, ?)', ground.id('disk')),
    by: 'references',
    kind: 'page-range-stale',
    severity: 'warning',
    names: (ground) => ['page 900000', ground.id('disk')],
    repaired: true,
  },
  {
    what: 'a resource lies in a pool that is not there',
    plant: (ground) => ground.sql("update resources set home_pool_id = ? where name = 'golden'", nobody),
    by: 'catalog',
    kind: 'reference-dangling',
    severity: 'error',
    names: () => ['resources row', 'pools'],
  },
  {
    what: 'a replica is of no layer',
    plant: (ground) =>
      ground.sql("insert into replicas values (4000000, (select id from pools), ?, 'complete', 1, null, 0)", adminProject.id),
    by: 'layers',
    kind: 'replica-of-nothing',
    severity: 'warning',
    names: () => ['layer 4000000'],
    repaired: true,
  },
  {
    what: "an index of the catalog's file has lost an entry",
    plant: (ground) => {
      ground.database.unsafeMode(true)
      ground.database.pragma('writable_schema = on')
      // The index is empty under this name, while the table is not.
      ground.database.exec(
        `create table decoy (name text, extra integer); create index decoy_index on decoy (name);
         update sqlite_schema set rootpage = (select rootpage from sqlite_schema where name = 'decoy_index') where name = 'pools_by_name'`,
      )
      ground.database.pragma('writable_schema = reset')
    },
    by: 'catalog',
    kind: 'catalog-damaged',
    severity: 'error',
    names: () => ['pools_by_name'],
  },
  {
    what: 'the file of a sealed layer is gone',
    plant: async (ground) => await rm(ground.layerPath(ground.middle())),
    by: 'layers',
    kind: 'layer-missing',
    severity: 'error',
    names: (ground) => [ground.layerId(ground.middle()), 'image "golden"'],
  },
  {
    what: 'the file of a layer that is written is gone',
    plant: async (ground) => await rm(ground.layerPath(ground.active('plain'))),
    by: 'layers',
    kind: 'layer-missing',
    severity: 'error',
    names: (ground) => [ground.layerId(ground.active('plain')), 'volume "plain"'],
  },
  {
    what: 'a file has no row',
    plant: async (ground) => {
      await cp(ground.layerPath(ground.middle()), join(home, 'pool', 'layers', `${nobody}.layer`))
    },
    by: 'layers',
    kind: 'layer-unknown',
    severity: 'warning',
    names: () => [nobody],
  },
  {
    what: 'the file of a layer is cut short',
    plant: async (ground) => await truncate(ground.layerPath(ground.middle()), mebibyte),
    by: 'layers',
    kind: 'layer-short',
    severity: 'error',
    names: (ground) => [ground.layerId(ground.middle()), mebibyte, 'image "golden"'],
  },
  {
    what: 'the file of a spare is gone',
    plant: async (ground) => await rm(ground.layerPath(spareOf(ground))),
    by: 'layers',
    kind: 'spare-missing',
    severity: 'warning',
    names: (ground) => [ground.layerId(spareOf(ground))],
    repaired: true,
  },
  {
    what: 'a spare has been written',
    plant: async (ground) => await writeFile(ground.layerPath(spareOf(ground)), 'written'),
    by: 'layers',
    kind: 'spare-written',
    severity: 'error',
    names: (ground) => [ground.layerId(spareOf(ground))],
    repaired: true,
  },
  {
    what: 'the mark that seals a layer is another',
    plant: async (ground) => await flip(await ground.segment(ground.middle()), 64 + 40),
    by: 'layers',
    kind: 'seal-missing',
    severity: 'warning',
    names: (ground) => [ground.layerId(ground.middle())],
    repaired: true,
  },
  {
    what: 'the header before the mark that seals a layer is another',
    plant: async (ground) => await flip(await ground.segment(ground.middle()), 30),
    by: 'layers',
    kind: 'seal-damaged',
    severity: 'warning',
    names: (ground) => [ground.layerId(ground.middle())],
  },
  {
    what: 'a sealed layer holds something for nobody',
    plant: async (ground) => {
      const file = await open(ground.layerPath(ground.middle()), 'r+')
      await file.write(pattern(9, slotBytes), 0, slotBytes, 20 * mebibyte)
      await file.close()
    },
    by: 'layers',
    kind: 'layer-unreferenced-data',
    severity: 'note',
    names: () => [`${slotBytes} bytes in 1 sealed`],
    repaired: true,
    deep: true,
  },
  {
    what: 'a frame in the middle of a journal is rotten',
    plant: async (ground) => await flip(await ground.segment(ground.active('dirty')), 64 + 48 + 40),
    by: 'journals',
    kind: 'journal-corrupt',
    severity: 'error',
    names: (ground) => [ground.id('dirty'), ground.layerId(ground.active('dirty')), ' at 112'],
  },
  {
    what: 'a journal is of a newer version',
    plant: async (ground) => {
      const path = await ground.segment(ground.active('dirty'))
      const bytes = await readFile(path)
      bytes.writeUInt16LE(7, 4)
      bytes.writeUInt32LE(crc32c(bytes.subarray(0, 60)), 60)
      await writeFile(path, bytes)
    },
    by: 'journals',
    kind: 'journal-version',
    severity: 'error',
    names: (ground) => [ground.id('dirty'), 'version 7'],
  },
  {
    what: 'a journal is of another volume',
    plant: (ground) => {
      const [disk, dirty] = [ground.active('disk'), ground.active('dirty')]
      ground.sql('update volumes set active_alias = 4000000 where id = ?', ground.id('disk'))
      ground.sql('update volumes set active_alias = ? where id = ?', disk, ground.id('dirty'))
      ground.sql('update volumes set active_alias = ? where id = ?', dirty, ground.id('disk'))
    },
    by: 'journals',
    kind: 'journal-corrupt',
    severity: 'error',
    names: (ground) => [ground.id('disk'), ground.id('dirty')],
  },
  {
    what: 'the catalog is older than a journal',
    plant: (ground) => ground.sql('update volumes set map_lsn = map_lsn - 1 where id = ?', ground.id('disk')),
    by: 'journals',
    kind: 'catalog-behind',
    severity: 'error',
    names: (ground) => [ground.id('disk'), ground.layerId(ground.active('disk'))],
  },
  {
    what: 'a volume is to write a layer that is sealed in the pool',
    plant: (ground) =>
      ground.sql('update volumes set active_alias = ?, map_lsn = 1000 where id = ?', ground.middle(), ground.id('disk')),
    by: 'journals',
    kind: 'catalog-behind',
    severity: 'error',
    names: (ground) => [ground.id('disk'), ground.layerId(ground.middle())],
  },
  {
    what: 'the journal of a volume that was closed goes on',
    plant: (ground) => ground.sql('update leases set released_at = 1 where volume_id = ?', ground.id('dirty')),
    by: 'journals',
    kind: 'journal-ahead',
    severity: 'warning',
    names: (ground) => [ground.id('dirty'), '4 frames'],
  },
  {
    what: 'the owner record of a pool is gone',
    plant: async () => await rm(join(home, 'pool', 'records', 'owner')),
    by: 'pools',
    kind: 'owner-record-missing',
    severity: 'error',
    names: () => [join(home, 'pool')],
  },
  {
    what: 'the owner record of a pool is of somebody else',
    plant: async () => {
      const path = join(home, 'pool', 'records', 'owner')
      await writeFile(path, JSON.stringify({ ...(JSON.parse(await readFile(path, 'utf8')) as object), catalogId: nobody }))
    },
    by: 'pools',
    kind: 'owner-record-foreign',
    severity: 'error',
    names: () => [nobody],
  },
  {
    what: 'the owner record of a pool cannot be read',
    plant: async () => await truncate(join(home, 'pool', 'records', 'owner'), 7),
    by: 'pools',
    kind: 'owner-record-unreadable',
    severity: 'error',
    names: () => [join(home, 'pool')],
  },
  {
    what: 'a record that a pool keeps about itself is damaged',
    plant: async () => {
      const records = join(home, 'pool', 'records')
      const name = (await readdir(records)).find((record) => record.startsWith('export.base'))
      await flip(join(records, name ?? ''), 200)
    },
    by: 'exports',
    kind: 'export-damaged',
    severity: 'warning',
    names: () => ['export.base'],
    repaired: true,
  },
  {
    what: 'the catalog is older than what a pool says about itself',
    plant: (ground) => {
      ground.database.exec('delete from export_changes')
      ground.sql("update sqlite_sequence set seq = 1 where name = 'export_changes'")
    },
    by: 'exports',
    kind: 'catalog-older',
    severity: 'error',
    names: (ground) => [ground.value('select id from pools'), 'pool "default"'],
    isOld: true,
  },
]

/** A number that no page has yet. */
function nextPage(ground: Ground): number {
  return ground.value('select max(id) + 1 from pages')
}

function spareOf(ground: Ground): number {
  return ground.value("select min(alias) from layers where state = 'spare' and volume_id is null")
}

/** The home as it was left, alive. */
async function again(before: () => Promise<void> = async () => undefined): Promise<Life> {
  await rm(home, { recursive: true, force: true })
  copy(template, home)
  await before()
  return await live()
}

function matches(finding: CheckFinding, damage: Damage, names: readonly (string | number)[]): boolean {
  const { severity, kind, object, message } = finding
  return (
    severity === damage.severity && kind === damage.kind && names.every((name) => `${object}\n${message}`.includes(String(name)))
  )
}

test('nothing is wrong with a home that was killed, and it stays in use', async () => {
  await using life = await again()
  const report = await life.mapper.check({ deep: true })
  expect(report.findings.map(({ kind }) => kind)).toEqual(['volume-dirty'])
  expect(report).toMatchObject({ errors: 0, warnings: 0, notes: 1, repaired: 0 })
  expect(await life.mapper.check({ repair: true })).toMatchObject({ errors: 0, warnings: 0, repaired: 0 })
})

describe('a check finds', () => {
  test.each(damages)('that $what ($kind)', async (damage) => {
    let names: readonly (string | number)[] = []
    const plant = async (): Promise<void> => {
      const ground = new Ground()
      names = damage.names(ground)
      await damage.plant(ground)
      ground.database.close()
    }
    await using life = await again(damage.isOld === true ? plant : undefined)
    if (damage.isOld !== true) await plant()
    const options = { deep: damage.deep === true }
    const look = async (more: object = {}): Promise<CheckFinding[]> => {
      const { findings } = await life.mapper.check({ ...options, ...more })
      return findings.filter((finding) => matches(finding, damage, names))
    }
    const found = await look()
    expect(found, JSON.stringify(await life.mapper.check(options), null, 1)).not.toEqual([])
    expect(found.every(({ repairable }) => repairable === (damage.repaired === true))).toBe(true)
    // The part that is there for it finds it, and no other.
    expect(await look({ subjects: checkSubjects.filter((subject) => subject !== damage.by) })).toEqual([])
    const repaired = await look({ repair: true })
    expect(repaired).toHaveLength(found.length)
    expect(repaired.every(({ repair }) => (repair !== null) === (damage.repaired === true))).toBe(true)
    expect(await look()).toHaveLength(damage.repaired === true ? 0 : found.length)
  })
})
