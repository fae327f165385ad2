import { createHash, randomBytes } from 'node:crypto'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { isAtollError } from '@atoll/core'
import type { Composer } from './composer.ts'
import { afterPrefix, type ListingOptions } from './file-listing.ts'
import type { PutOptions, Reading } from './file-service.ts'
import { killAtScenario, makeFolder, mebibyte, TestClient, TestDaemon, until } from './testing.ts'

let folder: string
let removeFolder: () => Promise<void>
let daemon: TestDaemon
let composer: Composer

async function start(): Promise<void> {
  daemon = await TestDaemon.open(folder)
  composer = daemon.composer
}

beforeEach(async () => {
  const made = await makeFolder()
  folder = made.folder
  removeFolder = made.remove
  await start()
})
afterEach(async () => {
  await daemon.stop()
  await removeFolder()
})

async function* chunks(content: Buffer, chunkBytes = 10_007): AsyncGenerator<Uint8Array> {
  for (let at = 0; at < content.length; at += chunkBytes) yield content.subarray(at, at + chunkBytes)
}

const put = async (path: string, content: Buffer | string, options: Partial<PutOptions> = {}) => {
  const [container = '', ...rest] = path.split('/')
  const bytes = typeof content === 'string' ? Buffer.from(content) : content
  return await composer.files.put({ container, name: rest.join('/'), stream: chunks(bytes), ...options })
}

async function contentOf(reading: Reading): Promise<Buffer> {
  const pieces: Uint8Array[] = []
  for await (const piece of reading.content) pieces.push(piece)
  return Buffer.concat(pieces)
}

const get = async (path: string, version?: string): Promise<string> =>
  String(await contentOf(await composer.files.read({ path, ...(version === undefined ? {} : { version }) })))
const md5 = (content: Buffer | string): string => createHash('md5').update(content).digest('hex')
const storedBytes = async (): Promise<number> => (await composer.pools.show('default')).storedBytes

async function reclaim(): Promise<void> {
  await composer.jobs.wait((await composer.pools.reclaim('default')).id)
}

/** Rows of files and what is written of them. */
async function fileRows(): Promise<number> {
  const { files } = await daemon.catalog.db
    .selectFrom('resources')
    .select(({ fn }) => fn.countAll<number>().as('files'))
    .where('kind', '=', 'file')
    .executeTakeFirstOrThrow()
  return Number(files)
}

describe('a start', () => {
  test('removes no file that lies in a container, and no finished image, whatever their status says', async () => {
    await put('c/kept', 'content')
    const image = await composer.images.create({ name: 'image', from: 'file:c/kept' })
    for (const status of ['creating', 'deleting', 'error', 'available'] as const) {
      await daemon.catalog.write(async (tx) => await tx.updateTable('resources').set({ status }).execute())
      await daemon.stop()
      await start()
      await reclaim()
      const { count } = await daemon.catalog.db
        .selectFrom('resources')
        .select(({ fn }) => fn.countAll<number>().as('count'))
        .executeTakeFirstOrThrow()
      expect(Number(count)).toBe(2)
    }
    expect(await get('c/kept')).toBe('content')
    expect(await composer.images.show(image.id)).toMatchObject({ id: image.id, sizeBytes: 7 })
  })
})

describe('a put', () => {
  test('stores content of any length, with its MD5, type and metadata', async () => {
    for (const sizeBytes of [0, 1, 4095, 4096, 4097, mebibyte + 1, 5 * mebibyte - 3]) {
      const content = randomBytes(sizeBytes)
      const view = await put(`c/size-${sizeBytes}`, content, { contentType: 'image/png', metadata: { a: 'b' } })
      expect(view).toMatchObject({ sizeBytes, etag: md5(content), contentType: 'image/png', metadata: { a: 'b' }, current: true })
      const reading = await composer.files.read({ path: `c/size-${sizeBytes}` })
      expect(reading).toMatchObject({ sizeBytes, offsetBytes: 0, lengthBytes: sizeBytes, file: view })
      expect((await contentOf(reading)).equals(content)).toBe(true)
    }
    expect(await composer.files.showContainer('c')).toMatchObject({ fileCount: 7, versioned: false })
  })

  test('keeps blocks of zeros as holes', async () => {
    const content = Buffer.concat([Buffer.alloc(8 * mebibyte), Buffer.from('end')])
    await put('c/sparse', content)
    expect(await storedBytes()).toBeLessThan(mebibyte)
    expect((await contentOf(await composer.files.read({ path: 'c/sparse' }))).equals(content)).toBe(true)
  })

  test('that is refused, breaks off or brings other content than was said changes nothing and leaves nothing', async () => {
    await put('c/kept', 'old')
    const broken = async function* (): AsyncGenerator<Uint8Array> {
      yield randomBytes(3 * mebibyte)
      throw new Error('the peer went away')
    }
    await expect(put('c/kept', '', { stream: broken() })).rejects.toMatchObject({ code: 'FILE_STREAM_LOST' })
    await expect(put('new/kept', '', { stream: broken() })).rejects.toMatchObject({ code: 'FILE_STREAM_LOST' })
    await expect(put('c/kept', 'new', { sizeBytes: 4 })).rejects.toMatchObject({ code: 'FILE_STREAM_LOST' })
    await expect(put('c/kept', 'new', { sizeBytes: 2 })).rejects.toMatchObject({ code: 'SIZE_INVALID' })
    await expect(put('c/kept', '', { sizeBytes: 2 })).rejects.toMatchObject({ code: 'FILE_STREAM_LOST' })
    await expect(put('c/kept', 'new', { sizeBytes: -1 })).rejects.toMatchObject({ code: 'SIZE_INVALID' })
    await expect(put('c/kept', 'new', { etag: md5('else') })).rejects.toMatchObject({ code: 'ETAG_MISMATCH' })
    await expect(put('c/kept', 'new', { onlyIfNew: true })).rejects.toMatchObject({ code: 'NAME_TAKEN' })
    await expect(put('c/kept', '', { onlyIfNew: true })).rejects.toMatchObject({ code: 'NAME_TAKEN' })
    await expect(put('c/kept', 'new', { pool: 'nowhere' })).rejects.toMatchObject({ code: 'POOL_NOT_FOUND' })
    await expect(put('c/kept', 'new', { project: 'nobody' })).rejects.toMatchObject({ code: 'PROJECT_NOT_FOUND' })
    await expect(put('c/kept', 'new', { metadata: { k: 'v'.repeat(257) } })).rejects.toMatchObject({ code: 'METADATA_INVALID' })
    await expect(put('c/kept', 'new', { contentType: 'a\nb' })).rejects.toMatchObject({ code: 'METADATA_INVALID' })
    for (const path of ['c/', '/n', `${'c'.repeat(257)}/n`, `c/${'n'.repeat(1025)}`, 'c/a\0', '\ud800/n']) {
      await expect(put(path, 'new'), path).rejects.toMatchObject({ code: 'NAME_INVALID' })
    }
    expect(await get('c/kept')).toBe('old')
    expect((await composer.files.listContainers()).map(({ name }) => name)).toEqual(['c'])
    expect(await fileRows()).toBe(1)
    await reclaim()
    expect(await storedBytes()).toBe(4096)
  })

  test('replaces at once: a reader goes on with what it began to read, and then that goes', async () => {
    const old = randomBytes(3 * mebibyte)
    await put('c/n', old)
    const reading = await composer.files.read({ path: 'c/n' })
    const first = await reading.content.next()
    await put('c/n', 'new')
    expect(await get('c/n')).toBe('new')
    await reclaim()
    const rest = await contentOf(reading)
    expect(Buffer.concat([first.value as Uint8Array, rest]).equals(old)).toBe(true)
    expect(await fileRows()).toBe(1)
    await reclaim()
    expect(await storedBytes()).toBe(4096)
  })

  test('of one name at the same time: each is whole, one of them is there, and readers see nothing else', async () => {
    const contents = Array.from({ length: 12 }, (_, index) => Buffer.alloc(200_000 + index, index + 1))
    const known = new Set(contents.map((content) => md5(content)))
    await put('c/n', contents[0] as Buffer)
    const seen: string[] = []
    let done = false
    const readers = Array.from({ length: 3 }, async () => {
      while (!done) {
        const reading = await composer.files.read({ path: 'c/n' })
        const content = md5(await contentOf(reading))
        expect(content).toBe(reading.file?.etag)
        seen.push(content)
      }
    })
    await Promise.all(contents.map(async (content) => await put('c/n', content)))
    done = true
    await Promise.all(readers)
    expect(seen.every((content) => known.has(content))).toBe(true)
    expect(known).toContain(md5(await contentOf(await composer.files.read({ path: 'c/n' }))))
    expect(seen.length).toBeGreaterThan(0)
    expect(await fileRows()).toBe(1)
    await reclaim()
    expect(await storedBytes()).toBeLessThan(220_000)
  })

  test('that does not fit is refused and leaves nothing', async () => {
    await composer.pools.create({ name: 'tiny', driver: 'memory', options: { capacity: '1M' } })
    await put('c/n', 'old', { pool: 'tiny' })
    await expect(put('c/n', randomBytes(4 * mebibyte), { pool: 'tiny' })).rejects.toMatchObject({ code: 'NO_SPACE' })
    await expect(put('d/n', randomBytes(4 * mebibyte), { pool: 'tiny' })).rejects.toMatchObject({ code: 'NO_SPACE' })
    expect(await get('c/n')).toBe('old')
    expect((await composer.files.listContainers()).map(({ name }) => name)).toEqual(['c'])
    await composer.jobs.wait((await composer.pools.reclaim('tiny')).id)
    expect((await composer.pools.show('tiny')).storedBytes).toBe(4096)
    await put('c/n', randomBytes(mebibyte / 2), { pool: 'tiny' })
    expect(await composer.files.show({ path: 'c/n' })).toMatchObject({ pool: 'tiny', sizeBytes: mebibyte / 2 })
  })

  test('goes on while space is reclaimed and everything is checked', async () => {
    const content = randomBytes(6 * mebibyte)
    const slow = async function* (): AsyncGenerator<Uint8Array> {
      yield content.subarray(0, 3 * mebibyte)
      await reclaim()
      expect(await daemon.mapper.check()).toMatchObject({ findings: [] })
      yield content.subarray(3 * mebibyte)
    }
    await put('c/n', '', { stream: slow() })
    expect((await contentOf(await composer.files.read({ path: 'c/n' }))).equals(content)).toBe(true)
  })

  test('whose sender is silent when the daemon stops ends, and leaves nothing', async () => {
    const silent = async function* (): AsyncGenerator<Uint8Array> {
      yield randomBytes(2 * mebibyte)
      await new Promise(() => undefined)
    }
    const putting = Promise.allSettled([put('c/n', '', { stream: silent() })])
    await until(async () => (await fileRows()) === 1)
    await daemon.stop()
    expect(await putting).toMatchObject([{ status: 'rejected', reason: { code: 'DAEMON_STOPPING' } }])
    await start()
    expect(await composer.files.listContainers()).toEqual([])
    expect(await fileRows()).toBe(0)
  })

  test('that a kill interrupts leaves nothing, and the old content stays', async () => {
    await put('c/n', 'old')
    await daemon.stop()
    await killAtScenario(folder, 'put')
    await start()
    expect(await get('c/n')).toBe('old')
    expect(await fileRows()).toBe(1)
    await reclaim()
    expect(await storedBytes()).toBe(4096)
  })
})

describe('a read', () => {
  test('of any range has the bytes of that range', async () => {
    const content = randomBytes(3 * mebibyte + 17)
    await put('c/n', content)
    const ranges = [
      [0, 1],
      [4095, 2],
      [mebibyte - 1, mebibyte + 2],
      [3 * mebibyte + 16, 1],
      [3 * mebibyte + 16, 100],
      [3 * mebibyte + 17, 5],
      [12_345, 0],
    ] as const
    for (const [offsetBytes, lengthBytes] of ranges) {
      const reading = await composer.files.read({ path: 'c/n' }, { offsetBytes, lengthBytes })
      expect((await contentOf(reading)).equals(content.subarray(offsetBytes, offsetBytes + lengthBytes))).toBe(true)
    }
    const behind = { offsetBytes: content.length + 1 }
    await expect(composer.files.read({ path: 'c/n' }, behind)).rejects.toMatchObject({ code: 'RANGE_INVALID' })
    await expect(composer.files.read({ path: 'c/n' }, { lengthBytes: -1 })).rejects.toMatchObject({ code: 'ARGUMENT_INVALID' })
    await expect(composer.files.read({ path: 'c/n' }, { etag: md5('') })).rejects.toMatchObject({ code: 'ETAG_MISMATCH' })
    await expect(composer.files.read({ path: 'c/m' })).rejects.toMatchObject({ code: 'FILE_NOT_FOUND' })
    await expect(composer.files.read({ path: 'd/n' })).rejects.toMatchObject({ code: 'CONTAINER_NOT_FOUND' })
    await expect(composer.files.read({ path: 'd' })).rejects.toMatchObject({ code: 'NAME_INVALID' })
  })

  test('by what is not zeros has all of it, wherever the range begins and ends', async () => {
    const content = Buffer.alloc(40 * mebibyte + 17)
    for (const at of [5, 70_000, 3 * mebibyte - 1, 3 * mebibyte + 200_000, 33 * mebibyte + 4095, content.length - 1]) {
      randomBytes(Math.min(10_000, content.length - at)).copy(content, at)
    }
    randomBytes(2 * mebibyte).copy(content, 20 * mebibyte + 100)
    await put('c/n', content)
    for (const [offsetBytes, lengthBytes] of [
      [0, content.length],
      [4097, 36 * mebibyte],
      [21 * mebibyte + 1, 4095],
      [5 * mebibyte, mebibyte],
      [content.length - 1, 1],
      [content.length, 0],
    ] as const) {
      const reading = await composer.files.read({ path: 'c/n' }, { offsetBytes, lengthBytes })
      const found = Buffer.alloc(lengthBytes)
      let stretchBytes = 0
      for (let more = await reading.content.nextStretches(); more !== null; more = await reading.content.nextStretches()) {
        for (const { atBytes, data } of more) {
          found.set(data, atBytes)
          stretchBytes += data.length
        }
      }
      expect(found.equals(content.subarray(offsetBytes, offsetBytes + lengthBytes)), `${lengthBytes} from ${offsetBytes}`).toBe(
        true,
      )
      expect(stretchBytes).toBeLessThan(2.2 * mebibyte)
    }
  })

  test('of a volume of 512 TiB takes what it holds', async () => {
    const { id } = await composer.volumes.create({ name: 'v', sizeBytes: 2 ** 49 })
    await composer.volumes.attach('v')
    await new TestClient(composer, id).device.write(2 ** 43, Buffer.from('here'))
    const { content, lengthBytes } = await composer.files.readSource('volume:v', {})
    expect(lengthBytes).toBe(2 ** 49)
    const [stretch, ...others] = (await content.nextStretches()) ?? []
    expect(others).toEqual([])
    expect(stretch?.atBytes).toBe(2 ** 43)
    expect(Buffer.from(stretch?.data ?? []).subarray(0, 4)).toEqual(Buffer.from('here'))
    expect(await content.nextStretches()).toBeNull()
  })

  test('that is given up, even before it began, lets go', async () => {
    await put('c/n', randomBytes(3 * mebibyte))
    const unread = await composer.files.read({ path: 'c/n' })
    const begun = await composer.files.read({ path: 'c/n' })
    await begun.content.next()
    await composer.files.delete({ path: 'c/n' })
    await unread.content.return()
    await begun.content.close()
    await begun.content.close()
    expect(await fileRows()).toBe(0)
    expect((await begun.content.next()).done).toBe(true)
  })

  test('that is under way when the daemon stops ends, and what it held goes at the next start', async () => {
    await put('c/n', randomBytes(3 * mebibyte))
    const reading = await composer.files.read({ path: 'c/n' })
    await reading.content.next()
    await daemon.stop()
    await expect(reading.content.next()).rejects.toMatchObject({ code: 'DAEMON_STOPPING' })
    await start()
    expect(await fileRows()).toBe(1)
  })

  test('of an image, a snapshot and a volume takes them as files, a volume as it is at that moment', async () => {
    const { id } = await composer.volumes.create({ name: 'v', sizeBytes: mebibyte })
    await composer.volumes.attach('v')
    const { device } = new TestClient(composer, id)
    await device.write(100, Buffer.from('before'))
    await composer.snapshots.create(['v@s'])
    await composer.images.create({ name: 'i', from: 'v@s' })
    await device.write(100, Buffer.from('behind'))
    const piece = { offsetBytes: 99, lengthBytes: 8 }
    const read = async (source: string) => String(await contentOf(await composer.files.readSource(source, {}, piece)))
    expect(await read('image:i')).toBe('\0before\0')
    expect(await read('snapshot:v@s')).toBe('\0before\0')
    const moment = await composer.files.readSource('volume:v', {}, piece)
    await device.write(100, Buffer.from('later!'))
    expect(String(await contentOf(moment))).toBe('\0behind\0')
    expect(await fileRows()).toBe(0)
    // What a kill would leave of a volume's moment.
    const { id: projectId } = await composer.resolver.project({})
    const { id: poolId } = await composer.resolver.pool('default')
    await daemon.mapper.createFile({ projectId, name: 'moment', poolId }, id, { mayDrop: [], write: async () => undefined })
    await daemon.stop()
    await start()
    expect(await fileRows()).toBe(0)
    await expect(read('image:none')).rejects.toMatchObject({ code: 'IMAGE_NOT_FOUND' })
  })
})

describe('anything becomes anything', () => {
  test('without a copy: image to file to volume to image to file', async () => {
    const content = randomBytes(2 * mebibyte + 5)
    const file = await put('c/n', content, { contentType: 'text/x', metadata: { k: 'v' } })
    const before = await storedBytes()
    await composer.images.create({ name: 'i', from: 'file:c/n' })
    await composer.files.putFrom({ container: 'c', name: 'of-image', from: 'image:i' })
    const volume = await composer.volumes.create({ name: 'v', from: 'file:c/of-image' })
    expect(volume.sizeBytes).toBe(2 * mebibyte + 4096)
    await composer.files.putFrom({ container: 'c', name: 'of-volume', from: 'volume:v' })
    await composer.snapshots.create(['v@s'])
    await composer.files.putFrom({ container: 'c', name: 'of-snapshot', from: 'snapshot:v@s' })
    const copy = await composer.files.putFrom({ container: 'd', name: 'copy', from: 'file:c/n' })
    expect(copy).toMatchObject({ etag: file.etag, contentType: 'text/x', metadata: { k: 'v' }, sizeBytes: content.length })
    expect(await storedBytes()).toBe(before)
    for (const path of ['c/of-image', 'c/of-volume', 'c/of-snapshot', 'd/copy']) {
      const read = await contentOf(await composer.files.read({ path }))
      expect(read.subarray(0, content.length).equals(content), path).toBe(true)
    }
    await composer.files.putFrom({ container: 'c', name: 'n', from: 'file:c/n', metadata: {} })
    await composer.files.delete({ path: 'd/copy' })
    await composer.images.delete('i')
    await reclaim()
    expect((await contentOf(await composer.files.read({ path: 'c/n' }))).equals(content)).toBe(true)
    expect(await composer.files.show({ path: 'c/n' })).toMatchObject({
      etag: file.etag,
      metadata: {},
      usedBytes: expect.any(Number),
    })
  })

  test('but what is not there, is empty or is attached is refused', async () => {
    await put('c/empty', '')
    const sources = {
      'file:c/none': 'FILE_NOT_FOUND',
      'file:none/n': 'CONTAINER_NOT_FOUND',
      'file:n': 'NAME_INVALID',
      'image:none': 'IMAGE_NOT_FOUND',
      'floppy:a': 'ARGUMENT_INVALID',
    }
    for (const [from, code] of Object.entries(sources)) {
      await expect(composer.files.putFrom({ container: 'c', name: 'n', from }), from).rejects.toMatchObject({ code })
      await expect(composer.volumes.create({ name: 'v', from }), from).rejects.toMatchObject({ code })
    }
    await expect(composer.images.create({ name: 'i', from: 'file:c/empty' })).rejects.toMatchObject({ code: 'SIZE_INVALID' })
    expect((await composer.volumes.create({ name: 'v', from: 'file:c/empty' })).sizeBytes).toBe(4096)
    const { id } = await put('c/n', 'x')
    await expect(composer.volumes.attach(id)).rejects.toMatchObject({ code: 'ARGUMENT_INVALID' })
  })
})

describe('a listing', () => {
  /** What Swift would show, by the definition: everything, then filtered. */
  function expected(names: readonly string[], options: ListingOptions): string[] {
    const { prefix = '', delimiter = '', marker = '', endMarker, limit = 10_000 } = options
    const order = (a: string, b: string): number => Buffer.compare(Buffer.from(a), Buffer.from(b))
    const shown: string[] = []
    for (const name of names.toSorted(order)) {
      if (!name.startsWith(prefix) || order(name, marker) <= 0) continue
      if (endMarker !== undefined && endMarker !== '' && order(name, endMarker) >= 0) continue
      const at = delimiter === '' ? -1 : name.indexOf(delimiter, prefix.length)
      const entry = at < 0 ? name : `${name.slice(0, at + delimiter.length)}…`
      if (entry === `${marker}…` || shown.includes(entry)) continue
      shown.push(entry)
    }
    return shown.slice(0, limit)
  }

  const listed = async (options: ListingOptions): Promise<string[]> =>
    (await composer.files.list('c', options)).entries.map((entry) =>
      'commonPrefix' in entry ? `${entry.commonPrefix}…` : entry.name,
    )

  const names = [
    'a',
    'a/1',
    'a/2',
    'a/b/3',
    'a0',
    'b//1',
    'b/',
    'é/x',
    'z',
    '~',
    '\u{ffff}x/1',
    '\u{10ffff}/1',
    '\u{10ffff}/2',
    'Z',
    ' ',
    '\u{e000}',
  ]

  test('shows names in the order of their bytes, from any marker on, with prefix, delimiter, end and limit', async () => {
    for (const name of names) await composer.files.put({ container: 'c', name, stream: chunks(Buffer.from(name)) })
    await put('other/a', 'elsewhere')
    const markers = ['', 'a', 'a/', 'a/1', 'a0', 'b/', 'é', 'z', '\u{10ffff}/', '\u{10ffff}']
    for (const prefix of ['', 'a', 'a/', 'b/', 'q', '\u{10ffff}']) {
      for (const delimiter of ['', '/', '//', 'x']) {
        for (const marker of markers) {
          for (const [endMarker, limit] of [
            [undefined, 10_000],
            ['b/', 2],
            ['a', 3],
          ] as const) {
            const options = { prefix, delimiter, marker, limit, ...(endMarker === undefined ? {} : { endMarker }) }
            expect(await listed(options), JSON.stringify(options)).toEqual(expected(names, options))
          }
        }
      }
    }
    await expect(composer.files.list('c', { limit: 0 })).rejects.toMatchObject({ code: 'ARGUMENT_INVALID' })
    await expect(composer.files.list('c', { limit: 10_001 })).rejects.toMatchObject({ code: 'ARGUMENT_INVALID' })
    await expect(composer.files.list('c', { marker: '\ud800' })).rejects.toMatchObject({ code: 'ARGUMENT_INVALID' })
    await expect(composer.files.list('none')).rejects.toMatchObject({ code: 'CONTAINER_NOT_FOUND' })
  })

  test('in pages has every entry once', async () => {
    for (const name of names) await composer.files.put({ container: 'c', name, stream: chunks(Buffer.from(name)) })
    for (const delimiter of ['', '/']) {
      for (const limit of [1, 2, 3]) {
        const seen: string[] = []
        let marker = ''
        for (;;) {
          const { entries, next } = await composer.files.list('c', { delimiter, limit, marker })
          seen.push(...entries.map((entry) => ('commonPrefix' in entry ? `${entry.commonPrefix}…` : entry.name)))
          if (next === null) break
          marker = next.marker
        }
        expect(seen).toEqual(expected(names, { delimiter }))
      }
    }
  })

  test('of versions has each of them once, the newest of a name first', async () => {
    await composer.files.createContainer('c', { versioned: true })
    for (const name of ['a', 'b', 'c'])
      for (let version = 1; version <= 3; version += 1) await put(`c/${name}`, `${name}${version}`)
    await composer.files.delete({ path: 'c/b' })
    const whole = (await composer.files.list('c', { versions: true })).entries
    const shape = whole.map((entry) =>
      'commonPrefix' in entry ? '' : `${entry.name}${entry.deleteMarker ? '-' : ''}${entry.current ? '+' : ''}`,
    )
    expect(shape).toEqual(['a+', 'a', 'a', 'b-', 'b', 'b', 'b', 'c+', 'c', 'c'])
    for (const limit of [1, 2, 3, 4, 9, 10]) {
      const seen: unknown[] = []
      let next: { marker: string; versionMarker: string | null } | null = { marker: '', versionMarker: null }
      while (next !== null) {
        const { marker, versionMarker }: { marker: string; versionMarker: string | null } = next
        const page = await composer.files.list('c', {
          versions: true,
          limit,
          marker,
          ...(versionMarker === null ? {} : { versionMarker }),
        })
        seen.push(...page.entries)
        next = page.next
      }
      expect(seen).toEqual(whole)
    }
  })

  test('knows the end of a prefix', () => {
    expect(afterPrefix('a/')).toBe('a0')
    expect(afterPrefix('a\u{10ffff}')).toBe('b')
    expect(afterPrefix('\ud7ff')).toBe('\ue000')
    expect(afterPrefix('\u{10ffff}')).toBe(null)
    expect(afterPrefix('')).toBe(null)
  })
})

describe('what is said about a file', () => {
  test('is changed without its content: what is given replaces all that was said, and readers go on', async () => {
    const { id, createdAt } = await put('c/n', 'content', { metadata: { a: '1', b: '2' }, contentType: 'text/plain' })
    const reading = await composer.files.read({ path: 'c/n' })
    expect(await composer.files.set({ path: 'c/n' }, { metadata: { c: '3' } })).toMatchObject({
      id,
      createdAt,
      metadata: { c: '3' },
      contentType: 'text/plain',
      etag: md5('content'),
    })
    expect(await composer.files.set({ path: id }, { contentType: 'image/png' })).toMatchObject({ metadata: { c: '3' } })
    expect(await composer.files.set({ path: 'c/n' }, { metadata: {} })).toMatchObject({ metadata: {}, contentType: 'image/png' })
    expect(await contentOf(reading)).toEqual(Buffer.from('content'))
    await daemon.stop()
    await start()
    expect(await composer.files.show({ path: 'c/n' })).toMatchObject({ id, metadata: {}, contentType: 'image/png' })
  })

  test('is refused where it passes the limits, or of what is not there or was replaced', async () => {
    await composer.files.createContainer('c', { versioned: true })
    const old = await put('c/n', 'one', { metadata: { a: '1' } })
    const present = await put('c/n', 'two', { metadata: { a: '2' } })
    const set = async (path: string, changes: Parameters<typeof composer.files.set>[1]) =>
      await composer.files.set({ path }, changes)
    await expect(set('c/n', { metadata: { a: 'x'.repeat(257) } })).rejects.toMatchObject({ code: 'METADATA_INVALID' })
    await expect(set('c/n', { contentType: 'text\nplain' })).rejects.toMatchObject({ code: 'METADATA_INVALID' })
    await expect(set('c/m', { metadata: {} })).rejects.toMatchObject({ code: 'FILE_NOT_FOUND' })
    await expect(set('d/n', { metadata: {} })).rejects.toMatchObject({ code: 'CONTAINER_NOT_FOUND' })
    await expect(set(old.id, { metadata: {} })).rejects.toMatchObject({ code: 'ARGUMENT_INVALID' })
    expect(await composer.files.show({ path: old.id })).toMatchObject({ metadata: { a: '1' } })
    await composer.files.delete({ path: 'c/n' })
    await expect(set('c/n', { metadata: {} })).rejects.toMatchObject({ code: 'FILE_NOT_FOUND' })
    await expect(set(present.id, { metadata: {} })).rejects.toMatchObject({ code: 'ARGUMENT_INVALID' })
  })
})

describe('a versioned container', () => {
  test('keeps what puts replace and what is deleted, until a version is deleted by its id', async () => {
    await composer.files.createContainer('c', { versioned: true })
    const first = await put('c/n', 'one')
    const second = await put('c/n', 'two')
    expect(await get('c/n')).toBe('two')
    expect(await get('c/n', first.id)).toBe('one')
    expect(await get(first.id)).toBe('one')
    await composer.files.delete({ path: 'c/n' })
    await expect(get('c/n')).rejects.toMatchObject({ code: 'FILE_NOT_FOUND' })
    await expect(composer.files.delete({ path: 'c/n' })).rejects.toMatchObject({ code: 'FILE_NOT_FOUND' })
    expect(await get('c/n', second.id)).toBe('two')
    const { entries } = await composer.files.list('c', { versions: true })
    const marker = entries[0] as { id: string; deleteMarker: boolean }
    expect(marker.deleteMarker).toBe(true)
    await expect(get('c/n', marker.id)).rejects.toMatchObject({ code: 'FILE_NOT_FOUND' })
    await expect(composer.files.deleteContainer('c')).rejects.toMatchObject({ code: 'CONTAINER_NOT_EMPTY' })
    const third = await put('c/n', 'three')
    await composer.files.delete({ path: 'c/n', version: third.id })
    await expect(get('c/n')).rejects.toMatchObject({ code: 'FILE_NOT_FOUND' })
    for (const version of [first.id, second.id, marker.id]) await composer.files.delete({ path: 'c/n', version })
    await expect(composer.files.delete({ path: 'c/n', version: first.id })).rejects.toMatchObject({ code: 'FILE_NOT_FOUND' })
    await composer.files.deleteContainer('c')
    await reclaim()
    expect(await storedBytes()).toBe(0)
  })

  test('that is so no longer keeps the versions it has and makes no new ones', async () => {
    await composer.files.createContainer('c', { versioned: true })
    const kept = await put('c/n', 'kept')
    expect(await composer.files.setContainer('c', { versioned: false })).toMatchObject({ versioned: false })
    await put('c/n', 'gone')
    await put('c/n', 'last')
    await composer.files.delete({ path: 'c/n' })
    expect(await get('c/n', kept.id)).toBe('kept')
    expect((await composer.files.list('c', { versions: true })).entries).toHaveLength(1)
  })

  test('orders versions that are made within one tick of the clock', async () => {
    await composer.files.createContainer('c', { versioned: true })
    await Promise.all(Array.from({ length: 20 }, async (_, index) => await put('c/n', `${index}`)))
    const { entries } = await composer.files.list('c', { versions: true })
    const times = entries.map((entry) => ('commonPrefix' in entry ? 0 : entry.createdAt))
    expect(times).toEqual([...new Set(times)].toSorted((a, b) => b - a))
    expect(entries[0]).toMatchObject({ current: true })
  })
})

describe('containers', () => {
  test('are made, listed by name, and deleted when they are empty', async () => {
    expect(await composer.files.createContainer('b', { metadata: { k: 'v' } })).toMatchObject({ created: true })
    expect(await composer.files.createContainer('b')).toMatchObject({ created: false, container: { metadata: { k: 'v' } } })
    await put('a/n', 'four')
    expect(await composer.files.listContainers()).toMatchObject([
      { name: 'a', fileCount: 1, sizeBytes: 4 },
      { name: 'b', fileCount: 0, sizeBytes: 0 },
    ])
    await expect(composer.files.deleteContainer('a')).rejects.toMatchObject({ code: 'CONTAINER_NOT_EMPTY' })
    await expect(composer.files.deleteContainer('c')).rejects.toMatchObject({ code: 'CONTAINER_NOT_FOUND' })
    await expect(composer.files.createContainer('a/b')).rejects.toMatchObject({ code: 'NAME_INVALID' })
    await composer.files.delete({ path: 'a/n' })
    await composer.files.deleteContainer('a')
    await composer.files.deleteContainer('b')
    expect(await composer.files.listContainers()).toEqual([])
  })
})

test('the metadata of a container is changed item by item', async () => {
  await composer.files.createContainer('c', { metadata: { a: '1', b: '2' } })
  await composer.files.setContainer('c', { metadata: { a: '', c: '3', none: '' } })
  expect(await composer.files.setContainer('c', { versioned: true })).toMatchObject({
    metadata: { b: '2', c: '3' },
    versioned: true,
  })
  const many = Object.fromEntries(Array.from({ length: 89 }, (_, index) => [`k${index}`, 'v']))
  await expect(composer.files.setContainer('c', { metadata: many })).rejects.toMatchObject({ code: 'METADATA_INVALID' })
  await expect(composer.files.setContainer('d', { versioned: true })).rejects.toMatchObject({ code: 'CONTAINER_NOT_FOUND' })
  expect(await composer.files.showContainer('c')).toMatchObject({ metadata: { b: '2', c: '3' } })
})

function mulberry32(seed: number): () => number {
  let state = seed
  return () => {
    state = (state + 0x6d2b79f5) | 0
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state)
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32
  }
}

async function* brokenOff(lengthBytes: number): AsyncGenerator<Uint8Array> {
  yield Buffer.alloc(lengthBytes, 1)
  throw new Error('the sender is gone')
}

function ignoreMissing(error: unknown): void {
  if (!isAtollError(error, 'FILE_NOT_FOUND')) throw error
}

function ignoreLost(error: unknown): void {
  if (!isAtollError(error, 'FILE_STREAM_LOST')) throw error
}

test('containers know how much is in them, whatever happens to their files', async () => {
  const seed = randomBytes(4).readUInt32LE()
  const random = mulberry32(seed)
  const below = (end: number): number => Math.floor(random() * end)
  const pick = <T>(of: readonly T[]): T => of[below(of.length)] as T
  const containers = ['a', 'b']
  for (let huge = 0; huge < 2; huge += 1) await composer.volumes.create({ name: `huge-${huge}`, sizeBytes: 2 ** 45 })
  const readings: Reading[] = []
  const counted = async (name: string) => {
    const { entries } = await composer.files.list(name)
    return {
      fileCount: entries.length,
      sizeBytes: entries.reduce((sum, entry) => sum + ('sizeBytes' in entry ? entry.sizeBytes : 0), 0),
    }
  }
  await composer.files.createContainer('a')
  await composer.files.createContainer('b', { versioned: true })
  for (let step = 0; step < 150; step += 1) {
    const container = pick(containers)
    const path = `${container}/${pick(['x', 'y', 'z'])}`
    const roll = below(100)
    const versions = (await composer.files.list(container, { versions: true })).entries.flatMap((entry) =>
      'id' in entry ? [entry.id] : [],
    )
    if (roll < 30) await put(path, 'x'.repeat(below(10_000)))
    else if (roll < 45) await composer.files.putFrom({ container, name: path.slice(2), from: `volume:huge-${below(2)}` })
    else if (roll < 60) await composer.files.delete({ path }).catch(ignoreMissing)
    else if (roll < 70 && versions.length > 0) await composer.files.delete({ path: pick(versions) })
    else if (roll < 80) await composer.files.read({ path }).then((reading) => readings.push(reading), ignoreMissing)
    else if (roll < 85) await readings.pop()?.content.close()
    else if (roll < 90) await composer.files.setContainer(container, { versioned: below(2) === 0 })
    else if (roll < 95) await put(path, '', { stream: brokenOff(below(5000)) }).catch(ignoreLost)
    else await composer.files.set({ path }, { metadata: { step: String(step) } }).catch(ignoreMissing)
    expect(await composer.files.showContainer(container), `seed ${seed}, step ${step}`).toMatchObject(await counted(container))
  }
  for (const { content } of readings) await content.close()
  const views = await composer.files.listContainers()
  await daemon.stop()
  await start()
  expect(await composer.files.listContainers(), `seed ${seed}`).toEqual(views)
})

test('more readers than there may be are refused, and those that are done make room', async () => {
  await put('c/n', 'x')
  const readings: Reading[] = []
  const tooMany = async (): Promise<void> => {
    for (;;) readings.push(await composer.files.read({ path: 'c/n' }))
  }
  await expect(tooMany()).rejects.toSatisfy((error) => isAtollError(error, 'LIMIT_REACHED'))
  await readings[0]?.content.close()
  expect(await get('c/n')).toBe('x')
  await Promise.all(readings.map(async ({ content }) => await content.close()))
})
