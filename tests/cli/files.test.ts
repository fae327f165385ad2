import { spawn } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { open, readdir, readFile, stat, symlink, truncate, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { attach } from '../faults/broken-home.ts'
import { holdsWithin } from '../holds-within.ts'
import { atollPath, runProgram, TestHome } from '../test-home.ts'

const mib = 2 ** 20

interface File {
  readonly id: string
  readonly name: string
  readonly sizeBytes: number
  readonly etag: string | null
  readonly contentType: string
  readonly metadata: Record<string, string>
  readonly current: boolean
}

interface Container {
  readonly name: string
  readonly fileCount: number
  readonly sizeBytes: number
  readonly versioned: boolean
}

let home: TestHome
const path = (name: string): string => join(home.path, name)

async function source(name: string, content: Buffer | string): Promise<string> {
  await writeFile(path(name), content)
  return path(name)
}

const sameBytes = async (name: string, expected: Buffer): Promise<boolean> => (await readFile(path(name))).equals(expected)

/** Waits until something that the daemon does is done. */
async function until(condition: () => Promise<boolean>): Promise<void> {
  if (!(await holdsWithin(300_000, condition))) throw new Error('the condition did not come true in time')
}

/** While this process goes on: senders are its children. */
const storedIn = async (stand: TestHome): Promise<number> =>
  (await stand.jsonMeanwhile<{ storedBytes: number }>('pool', 'show', 'default')).storedBytes

async function reclaimed(stand: TestHome): Promise<number> {
  await stand.jsonMeanwhile('pool', 'reclaim', 'default')
  return await storedIn(stand)
}

beforeAll(async () => {
  home = await TestHome.create()
  await home.start()
})

afterAll(async () => {
  await home[Symbol.asyncDispose]()
})

describe('files', () => {
  test('are put from a path and from standard input, shown, listed, read back and deleted', async () => {
    const content = randomBytes(3 * mib + 1)
    const from = await source('in', content)
    const id = home.cli('file', 'put', 'c/dir/file', from, '--meta', 'a=b=c', '--meta', 'x=', '--content-type', 'image/png')
    expect(home.json<File>('file', 'show', 'c/dir/file')).toMatchObject({
      id,
      name: 'dir/file',
      sizeBytes: content.length,
      etag: expect.stringMatching(/^[0-9a-f]{32}$/),
      contentType: 'image/png',
      metadata: { a: 'b=c', x: '' },
      current: true,
    })
    home.cli('file', 'get', 'c/dir/file', path('out'))
    expect(await sameBytes('out', content)).toBe(true)
    home.cli('file', 'get', id, path('out'), '--offset', '1M', '--length', '4097')
    expect(await sameBytes('out', content.subarray(mib, mib + 4097))).toBe(true)
    expect(home.fail('file', 'get', 'c/dir/file', path('out'), '--offset', '1G')).toBe('RANGE_INVALID')

    const piped = home.runWith({ input: content }, 'file', 'put', 'c/piped', '-')
    expect(piped.exitCode, piped.stderr).toBe(0)
    expect(home.json<File>('file', 'show', 'c/piped').etag).toBe(home.json<File>('file', 'show', 'c/dir/file').etag)
    home.runWith({ input: '' }, 'file', 'put', 'c/empty', '-')
    expect(home.cli('file', 'get', 'c/empty', '-')).toBe('')
    home.cli('file', 'put', 'c/empty-file', await source('none', ''))

    expect(home.json<File[]>('file', 'list', 'c').map(({ name }) => name)).toEqual(['dir/file', 'empty', 'empty-file', 'piped'])
    expect(home.cli('file', 'list', 'c', '--delimiter', '/')).toMatch(/^NAME .*\ndir\/ /)
    expect(home.json<Container[]>('file', 'list')).toMatchObject([{ name: 'c', fileCount: 4, versioned: false }])
    expect(home.cli('file', 'list')).toContain('CONTAINER')
    expect(home.cli('file', 'show', 'c')).toContain('files:')
    expect(home.cli('file', 'show', 'c/dir/file')).toContain('meta a:')
    for (const name of ['dir/file', 'empty', 'empty-file', 'piped']) home.cli('file', 'delete', `c/${name}`)
    expect(home.fail('file', 'show', 'c/piped')).toBe('FILE_NOT_FOUND')
    home.cli('file', 'container', 'delete', 'c')
    expect(home.json('file', 'list')).toEqual([])
  })

  test('are put and got without a copy of anything else, as pools show', async () => {
    const content = randomBytes(4 * mib + 100)
    home.cli('file', 'put', 'c/original', await source('in', content))
    // What earlier tests deleted goes first, so that it does not go in between.
    const before = await reclaimed(home)
    home.cli('image', 'create', 'of-file', '--from', 'file:c/original')
    home.cli('file', 'put', 'c/of-image', '--from', 'image:of-file')
    home.cli('volume', 'create', 'of-image', '--from', 'file:c/of-image')
    home.cli('file', 'put', 'c/of-volume', '--from', 'volume:of-image')
    home.cli('snapshot', 'create', 'of-image@s')
    home.cli('file', 'put', 'c/of-snapshot', '--from', 'snapshot:of-image@s')
    home.cli('file', 'put', 'c/copy', '--from', 'file:c/original')
    expect(await reclaimed(home)).toBe(before)
    for (const name of ['c/of-image', 'c/copy', 'image:of-file']) {
      home.cli('file', 'get', name, path('out'))
      expect(await sameBytes('out', content), name).toBe(true)
    }
    const padded = Buffer.concat([content, Buffer.alloc(4096 - 100)])
    for (const name of ['c/of-volume', 'c/of-snapshot', 'volume:of-image', 'snapshot:of-image@s']) {
      home.cli('file', 'get', name, path('out'))
      expect(await sameBytes('out', padded), name).toBe(true)
    }
    home.cli('volume', 'delete', 'of-image', '--with-snapshots')
    home.cli('image', 'delete', 'of-file')
    for (const { name } of home.json<File[]>('file', 'list', 'c')) home.cli('file', 'delete', `c/${name}`)
  })

  test('get replaces the destination when all is there, writes holes, and takes pipes and standard output', async () => {
    await truncate(await source('sparse', ''), 32 * mib)
    home.cli('file', 'put', 'c/sparse', path('sparse'))
    await source('out', 'old')
    expect(home.fail('file', 'get', 'c/none', path('out'))).toBe('FILE_NOT_FOUND')
    expect(await readFile(path('out'), 'utf8')).toBe('old')
    home.cli('file', 'get', 'c/sparse', path('out'))
    expect(await sameBytes('out', Buffer.alloc(32 * mib))).toBe(true)
    expect(Number(runProgram('du', ['-k', path('out')]).stdout.split('\t')[0])).toBeLessThan(1024)
    home.cli('file', 'get', 'c/sparse', '/dev/null')
    expect(home.fail('file', 'get', 'c/sparse', home.path)).toBe('DESTINATION_INVALID')
    expect(home.fail('file', 'get', 'c/sparse', path('nowhere/out'))).toBe('IO_ERROR')
    await source('real', 'old')
    await symlink(path('real'), path('link'))
    home.cli('file', 'get', 'c/sparse', path('link'), '--length', '5')
    expect(await sameBytes('real', Buffer.alloc(5))).toBe(true)
    expect(home.cli('file', 'get', 'c/sparse', '-', '--length', '3')).toBe('\0\0\0')
    expect((await readdir(home.path)).filter((name) => name.includes('.atoll-'))).toEqual([])
    home.cli('file', 'delete', 'c/sparse')
  })

  test('get of what is large and thin writes only what is there', async () => {
    home.cli('volume', 'create', 'thin', '--size', '1T')
    await using client = await attach(home, 'thin')
    await client.write(600 * 2 ** 30, Buffer.alloc(8192, 7))
    expect(home.json('file', 'get', 'volume:thin', path('out'))).toEqual({ path: path('out'), sizeBytes: 2 ** 40 })
    expect((await stat(path('out'))).size).toBe(2 ** 40)
    expect(Number(runProgram('du', ['-k', path('out')]).stdout.split('\t')[0])).toBeLessThan(1024)
    await using file = await open(path('out'))
    const { buffer } = await file.read({ buffer: Buffer.alloc(8194, 1), position: 600 * 2 ** 30 - 1 })
    expect(buffer).toEqual(Buffer.concat([Buffer.alloc(1), Buffer.alloc(8192, 7), Buffer.alloc(1)]))
    await client.disconnect()
    home.cli('volume', 'detach', 'thin')
    home.cli('volume', 'delete', 'thin')
  })

  test('bad input is refused with a code and changes nothing', async () => {
    const from = await source('in', 'content')
    home.cli('file', 'put', 'c/kept', from)
    const long = (bytes: number): string => 'n'.repeat(bytes)
    for (const name of ['nowhere', 'c/', '/n', '', `${long(257)}/n`, `c/${long(1025)}`, `c/${'é'.repeat(513)}`]) {
      expect(home.fail('file', 'put', name, from), name).toBe('NAME_INVALID')
    }
    home.cli('file', 'put', `c/${'é'.repeat(512)}`, from)
    home.cli('file', 'delete', `c/${'é'.repeat(512)}`)
    home.cli('file', 'put', `${long(256)}/${long(1024)}`, from, '--meta', `${'k'.repeat(128)}=${'v'.repeat(256)}`)
    home.cli('file', 'delete', `${long(256)}/${long(1024)}`)
    home.cli('file', 'container', 'delete', long(256))
    expect(home.fail('file', 'put', 'c/n', from, '--meta', `${'k'.repeat(129)}=`)).toBe('METADATA_INVALID')
    const many = Array.from({ length: 91 }, (_, index) => ['--meta', `k${index}=`]).flat()
    expect(home.fail('file', 'put', 'c/n', from, ...many)).toBe('METADATA_INVALID')
    expect(home.fail('file', 'put', 'c/n', path('nothing'))).toBe('IO_ERROR')
    expect(home.fail('file', 'put', 'c/n', home.path)).toBe('IO_ERROR')
    expect(home.fail('file', 'put', 'c/kept', from, '--no-replace')).toBe('NAME_TAKEN')
    expect(home.fail('file', 'put', 'c/n', from, '--pool', 'nowhere')).toBe('POOL_NOT_FOUND')
    expect(home.fail('file', 'put', 'c/n', '--from', 'image:none')).toBe('IMAGE_NOT_FOUND')
    expect(home.fail('file', 'put', 'c/n', '--from', 'file:c/none')).toBe('FILE_NOT_FOUND')
    expect(home.fail('file', 'put', 'c/n', from, '--project', 'nobody')).toBe('PROJECT_NOT_FOUND')
    expect(home.fail('file', 'list', 'none')).toBe('CONTAINER_NOT_FOUND')
    expect(home.fail('file', 'delete', 'c/none')).toBe('FILE_NOT_FOUND')
    expect(home.fail('file', 'show', 'c/kept', '--version', 'x')).toBe('FILE_NOT_FOUND')
    expect(home.fail('file', 'container', 'create', 'c')).toBe('NAME_TAKEN')
    expect(home.fail('file', 'container', 'create', 'a/b')).toBe('NAME_INVALID')
    expect(home.fail('file', 'container', 'delete', 'c')).toBe('CONTAINER_NOT_EMPTY')
    expect(home.fail('volume', 'create', 'v', '--from', 'file:c/none')).toBe('FILE_NOT_FOUND')
    expect(home.fail('file', 'get', 'c/kept', path('out'), '--offset', '-1')).toBe('SIZE_INVALID')
    for (const args of [
      ['put', 'c/n'],
      ['put', 'c/n', from, '--from', 'image:x'],
      ['put', 'c/n', from, '--meta', 'novalue'],
      ['list', '--prefix', 'x'],
      ['list', 'c', '--limit', '0'],
      ['container', 'set', 'c', '--versioned', 'perhaps'],
      ['get', 'image:x', '-', '--version', 'x'],
    ]) {
      expect(home.run('file', ...args), args.join(' ')).toMatchObject({ exitCode: 2, stdout: '' })
    }
    expect(home.json<File[]>('file', 'list', 'c').map(({ name }) => name)).toEqual(['kept'])
    expect(home.json<Container[]>('file', 'list')).toHaveLength(1)
    home.cli('file', 'delete', 'c/kept')
  })

  test('what is said about a file and a container is changed without the content', async () => {
    const id = home.cli('file', 'put', 'c/n', await source('in', 'content'), '--meta', 'a=1', '--meta', 'b=2').trim()
    expect(home.cli('file', 'set', 'c/n', '--meta', 'c=3', '--content-type', 'text/plain').trim()).toBe(id)
    expect(home.json<File>('file', 'show', 'c/n')).toMatchObject({ id, metadata: { c: '3' }, contentType: 'text/plain' })
    expect(home.json<File>('file', 'set', id, '--no-meta')).toMatchObject({ metadata: {}, contentType: 'text/plain' })
    expect(home.run('file', 'set', 'c/n').exitCode).toBe(2)
    expect(home.fail('file', 'set', 'c/m', '--no-meta')).toBe('FILE_NOT_FOUND')
    expect(home.fail('file', 'set', 'c/n', '--content-type', 'ü')).toBe('METADATA_INVALID')
    home.cli('file', 'container', 'create', 'd', '--meta', 'a=1', '--meta', 'b=2')
    expect(home.json('file', 'container', 'set', 'd', '--meta', 'a=', '--meta', 'c=3')).toMatchObject({
      metadata: { b: '2', c: '3' },
    })
    expect(home.run('file', 'container', 'set', 'd').exitCode).toBe(2)
    home.cli('file', 'container', 'delete', 'd')
    expect(home.json<Container[]>('file', 'list')).toMatchObject([{ name: 'c', fileCount: 1, sizeBytes: 7 }])
    home.cli('image', 'create', 'unread', '--from', 'file:c/n')
    home.cli('file', 'put', 'c/unread', '--from', 'image:unread')
    expect(home.json<File>('file', 'show', 'c/unread').etag).toBeNull()
    expect(home.cli('file', 'show', 'c/unread')).toMatch(/^md5: +not known/m)
    home.cli('image', 'delete', 'unread')
    for (const name of ['n', 'unread']) home.cli('file', 'delete', `c/${name}`)
    home.cli('file', 'container', 'delete', 'c')
  })

  test('names that are awkward in a URL, a shell or a terminal work', async () => {
    const from = await source('in', 'content')
    for (const name of [
      'with space',
      'ünïcode ☃',
      'per%20cent',
      'a?b=c&d#e',
      "quote's",
      '../..',
      'line\nfeed',
      '\u001b[31m',
      '+',
      '//',
    ]) {
      home.cli('file', 'put', `awkward @ü/${name}`, from)
      expect(home.cli('file', 'get', `awkward @ü/${name}`, '-'), name).toBe('content')
      expect(home.cli('file', 'list', 'awkward @ü')).not.toContain('\u001b')
      home.cli('file', 'delete', `awkward @ü/${name}`)
    }
    home.cli('file', 'container', 'delete', 'awkward @ü')
  })

  test('versions are kept where a container is versioned', async () => {
    home.cli('file', 'container', 'create', 'versions', '--versioned', 'on')
    const first = home.cli('file', 'put', 'versions/n', await source('in', 'one'))
    home.cli('file', 'put', 'versions/n', await source('in', 'two'))
    expect(home.cli('file', 'get', 'versions/n', '-')).toBe('two')
    expect(home.cli('file', 'get', 'versions/n', '-', '--version', first)).toBe('one')
    home.cli('file', 'delete', 'versions/n')
    expect(home.fail('file', 'get', 'versions/n', '-')).toBe('FILE_NOT_FOUND')
    expect(home.json<File[]>('file', 'list', 'versions')).toEqual([])
    expect(home.cli('file', 'list', 'versions', '--versions')).toMatch(/deleted[^]*old[^]*old/)
    for (const { id } of home.json<File[]>('file', 'list', 'versions', '--versions')) home.cli('file', 'delete', id)
    expect(home.cli('file', 'container', 'set', 'versions', '--versioned', 'off')).toMatch(/versioned: +off/)
    home.cli('file', 'container', 'delete', 'versions')
  })
})

test('a put whose sender is killed, and one in which the daemon is killed, leave the old content and nothing else', async () => {
  await using own = await TestHome.create()
  await own.start()
  await writeFile(join(own.path, 'old'), 'old')
  own.cli('file', 'put', 'c/n', join(own.path, 'old'))
  for (const victim of ['sender', 'daemon']) {
    const sender = spawn(atollPath, ['file', 'put', 'c/n', '-', '--home', own.path], { stdio: ['pipe', 'ignore', 'pipe'] })
    const ended = once(sender, 'exit')
    sender.stdin.on('error', () => undefined)
    sender.stdin.write(randomBytes(16 * mib))
    await until(async () => (await storedIn(own)) > 4 * mib)
    if (victim === 'sender') {
      sender.kill('SIGKILL')
      await ended
      await until(async () => (await reclaimed(own)) === 4096)
    } else {
      await own.end('SIGKILL')
      await ended
      sender.stdin.destroy()
      await own.start()
    }
    expect(own.cli('file', 'get', 'c/n', '-')).toBe('old')
    expect(own.json<File[]>('file', 'list', 'c')).toHaveLength(1)
    expect(await reclaimed(own)).toBe(4096)
    // How full the disk of this machine is does not matter.
    own.cli('pool', 'set', 'default', 'low-space=off')
    expect(own.json<{ findings: unknown[] }>('pool', 'check', 'default').findings).toEqual([])
  }
})

test('SIGTERM ends a put that is under way, and the daemon ends with 0', async () => {
  await using own = await TestHome.create()
  await own.start()
  const sender = spawn(atollPath, ['file', 'put', 'c/n', '-', '--home', own.path], { stdio: ['pipe', 'ignore', 'pipe'] })
  // `close`, not `exit`: what it printed last is known by then.
  const ended = once(sender, 'close')
  let message = ''
  sender.stderr.on('data', (text) => (message += String(text)))
  sender.stdin.on('error', () => undefined)
  sender.stdin.write(randomBytes(16 * mib))
  await until(async () => (await storedIn(own)) > 4 * mib)
  expect(await own.end('SIGTERM')).toBe(0)
  expect(await ended).toEqual([1, null])
  expect(message).toMatch(/DAEMON_STOPPING|DAEMON_NOT_RUNNING/)
  await own.start()
  expect(own.json('file', 'list')).toEqual([])
})
