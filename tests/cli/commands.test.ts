import { mkdir, readFile, rm, truncate, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { connect } from '@atoll/nbd-client'
import { runProgram, succeed, TestHome } from '../test-home.ts'
import { hasPrograms } from './test-programs.ts'

const mib = 2 ** 20
const absentId = '5f0c1c1e-8d1c-4e57-9a34-1c9c55f6a5f0'

interface Volume {
  readonly id: string
  readonly name: string
  readonly status: string
  readonly sizeBytes: number
  readonly pool: string
  readonly parent: string | null
  readonly attachments: { readonly protocol: string; readonly uri: string; readonly readOnly: boolean }[]
  readonly usedBytes: number
  readonly sharedBytes: number
}

interface Job {
  readonly id: string
  readonly kind: string
  readonly state: string
}

let home: TestHome

/** Without `toEqual`, which compares byte by byte and is slow for a disk. */
async function sameBytes(path: string, expected: Buffer): Promise<boolean> {
  return (await readFile(path)).equals(expected)
}

beforeAll(async () => {
  home = await TestHome.create()
  await home.start()
})

afterAll(async () => {
  await home[Symbol.asyncDispose]()
})

describe('a check', () => {
  test('says that nothing is wrong, and of a damage where it is and what to do, with 1', async () => {
    // How full the disk of this machine is does not matter.
    home.cli('pool', 'set', 'default', 'low-space=off')
    const checked = home.json<{ errors: number; warnings: number; findings: object[]; more: number }>('check')
    expect(checked).toMatchObject({ errors: 0, warnings: 0, repaired: 0, more: 0 })
    expect(home.cli('check', '--repair', '--deep')).toContain('0 errors, 0 warnings')
    const [pool] = home.json<{ options: { path: string } }[]>('pool', 'list')
    const owner = join(pool?.options.path ?? '', 'records', 'owner')
    const record = await readFile(owner)
    try {
      await rm(owner)
      const result = home.run('check')
      expect(result.exitCode).toBe(1)
      expect(result.stdout).toMatch(/^error: owner-record-missing: the pool at .*: restart the daemon/im)
      expect(result.stdout).toMatch(/^1 errors, 0 warnings, /m)
    } finally {
      await writeFile(owner, record)
    }
    expect(home.run('check').exitCode).toBe(0)
  })
})

describe('the command line itself', () => {
  const groups = ['serve', 'status', 'pool', 'volume', 'migrate', 'snapshot', 'image', 'file', 'catalog', 'check', 'job']

  test('help is printed with 0, and every command has an example', () => {
    const top = home.cli('--help')
    for (const group of groups) expect(top).toContain(`  ${group}`)
    for (const group of groups) {
      const help = home.cli(group, '--help')
      const commands = [...help.matchAll(/^ {2}([a-z]+)(?: \[options\])?(?: [<[].*)? {2,}/gm)].map((match) => match[1] ?? '')
      const leaves = commands.filter((name) => name !== 'help')
      // A group without commands is one itself.
      const helps = leaves.length === 0 ? [help] : leaves.map((leaf) => home.cli(group, leaf, '--help'))
      for (const text of helps) expect(text).toContain('Example:')
    }
  })

  test('wrong usage ends with 2 and prints nothing on standard output', () => {
    for (const args of [
      ['frobnicate'],
      ['volume'],
      ['volume', 'frobnicate'],
      ['volume', 'create'],
      ['volume', 'create', 'x', '--frobnicate'],
      ['volume', 'attach', 'x', '--format', 'pdf'],
      ['pool', 'create', 'x'],
      ['pool', 'create', 'x', '--driver', 'file', '--option', 'path'],
    ]) {
      expect(home.run(...args), args.join(' ')).toMatchObject({ exitCode: 2, stdout: '' })
    }
  })

  test('a home without a daemon is named', async () => {
    await using empty = await TestHome.create()
    const result = empty.run('volume', 'list')
    expect(result).toMatchObject({ exitCode: 1, stdout: '' })
    expect(result.stderr).toContain(`DAEMON_NOT_RUNNING: no daemon serves ${empty.path}`)
  })

  test('--json prints one document and nothing else', () => {
    for (const args of [
      ['status'],
      ['pool', 'list'],
      ['volume', 'list'],
      ['image', 'list'],
      ['job', 'list'],
      ['pool', 'show', 'default'],
    ]) {
      expect(() => JSON.parse(home.cli(...args, '--json')), args.join(' ')).not.toThrow()
      expect(home.cli('--json', ...args)).not.toBe('')
    }
  })
})

describe('pools', () => {
  test('a file pool is made, shown, checked and deleted; the CLI makes its path absolute', async () => {
    const folder = join(home.path, 'disks')
    await mkdir(folder)
    const created = home.runWith({ cwd: folder }, 'pool', 'create', 'fast', '--driver', 'file', '--option', 'path=fast')
    expect(created.exitCode, created.stderr).toBe(0)
    const shown = home.json<Record<string, unknown>>('pool', 'show', 'fast')
    expect(shown).toMatchObject({
      name: 'fast',
      driver: 'file',
      options: { path: join(folder, 'fast') },
      capabilities: expect.objectContaining({ punchUnitBytes: expect.any(Number) }),
      totalBytes: expect.any(Number),
      freeBytes: expect.any(Number),
      storedBytes: expect.any(Number),
      logicalBytes: 0,
      dedupRatio: expect.any(Number),
      layers: expect.any(Number),
    })
    expect(home.cli('pool', 'list')).toMatch(/^NAME .*\n.*default/)
    expect(home.cli('pool', 'show', 'fast')).toContain('driver:')
    home.cli('pool', 'set', 'fast', 'overcommit=0.001', 'low-space=1K', 'reserve=2M')
    const settings = { overcommit: '0.001', 'low-space': '1K', reserve: '2M' }
    const reserved = { settings, lowSpace: false, lowSpaceBytes: 1024, reserveBytes: 2 * 2 ** 20, provisionedBytes: 0 }
    expect(home.json('pool', 'show', 'fast')).toMatchObject(reserved)
    expect(home.json<{ findings: unknown[] }>('pool', 'check', 'fast').findings).toEqual([])
    home.cli('pool', 'set', 'fast', 'low-space=99.99%')
    const findings = [
      expect.objectContaining({ severity: 'warning', kind: 'low-space', message: expect.stringContaining('"fast"') }),
    ]
    expect(home.json('pool', 'check', 'fast')).toEqual({ findings })
    expect(home.cli('check')).toContain('warning: low-space: ')
    home.cli('pool', 'set', 'fast', 'low-space=1K')
    expect(home.fail('volume', 'create', 'huge', '--size', '512T', '--pool', 'fast')).toBe('POOL_OVERCOMMITTED')
    expect(home.fail('pool', 'set', 'fast', 'colour=red')).toBe('POOL_OPTION_INVALID')
    expect(home.run('pool', 'set', 'fast', 'red').exitCode).toBe(2)
    home.cli('pool', 'set', 'fast', 'overcommit=default')
    expect(home.json('pool', 'show', 'fast')).toMatchObject({ ...reserved, settings: { ...settings, overcommit: 'unlimited' } })
    home.cli('pool', 'delete', 'fast')
    expect(home.fail('pool', 'show', 'fast')).toBe('POOL_NOT_FOUND')
  })

  test('is made with its settings, or not at all', () => {
    const path = `path=${join(home.path, 'set')}`
    const create = (...settings: string[]): string[] =>
      ['pool', 'create', 'set', '--driver', 'file', '--option', path].concat(settings.flatMap((pair) => ['--set', pair]))
    for (const [wrong, code] of [
      ['colour=red', 'POOL_OPTION_INVALID'],
      ['overcommit=-1', 'POOL_OPTION_INVALID'],
      ['reserve=1T', 'POOL_OPTION_INVALID'],
    ] as const) {
      expect(home.fail(...create(wrong)), wrong).toBe(code)
    }
    expect(home.run(...create('red')).exitCode).toBe(2)
    expect(home.fail('pool', 'create', 'set', '--driver', 'memory', '--set', 'reserve=1M')).toBe('POOL_UNSUPPORTED')
    expect(home.fail('pool', 'show', 'set')).toBe('POOL_NOT_FOUND')
    home.cli(...create('overcommit=2', 'low-space=off', 'reserve=3M'))
    const settings = { overcommit: '2', 'low-space': 'off', reserve: '3M' }
    expect(home.json('pool', 'show', 'set')).toMatchObject({ settings, lowSpaceBytes: 0, reserveBytes: 3 * 2 ** 20 })
    home.cli('pool', 'delete', 'set')
  })

  test('a file that the backend has and the catalog does not is reported by check and kept', async () => {
    const unknown = join(home.path, 'pools', 'default', 'layers', `${absentId}.layer`)
    await writeFile(unknown, 'newest data, perhaps')
    const { findings } = home.json<{ findings: { message: string; object: string }[] }>('pool', 'check', 'default')
    expect(JSON.stringify(findings)).toContain(absentId)
    home.cli('pool', 'reclaim', 'default')
    expect(await readFile(unknown, 'utf8')).toBe('newest data, perhaps')
  })

  test('a value of an option can come from a file', async () => {
    await writeFile(join(home.path, 'where'), `${join(home.path, 'from-file')}\n`)
    home.cli('pool', 'create', 'secretive', '--driver', 'file', '--option', `path=@${join(home.path, 'where')}`)
    expect(home.json<{ options: object }>('pool', 'show', 'secretive').options).toEqual({ path: join(home.path, 'from-file') })
    home.cli('pool', 'delete', 'secretive')
    expect(home.fail('pool', 'create', 'x', '--driver', 'file', '--option', 'path=@/does/not/exist')).toBe('IO_ERROR')
  })

  test('errors name what was wrong', () => {
    expect(home.fail('pool', 'create', 'p', '--driver', 'floppy')).toBe('DRIVER_UNKNOWN')
    expect(home.fail('pool', 'create', 'p', '--driver', 'file')).toBe('POOL_OPTION_INVALID')
    expect(home.fail('pool', 'create', 'p', '--driver', 'file', '--option', 'path=/tmp/x', '--option', 'colour=red')).toBe(
      'POOL_OPTION_INVALID',
    )
    expect(home.fail('pool', 'create', 'default', '--driver', 'memory')).toBe('NAME_TAKEN')
    expect(home.fail('pool', 'create', 'a/b', '--driver', 'memory')).toBe('NAME_INVALID')
    expect(home.fail('pool', 'show', absentId)).toBe('POOL_NOT_FOUND')
    expect(home.fail('pool', 'check', 'nowhere')).toBe('POOL_NOT_FOUND')
    expect(home.fail('pool', 'reclaim', 'nowhere')).toBe('POOL_NOT_FOUND')
  })

  test('a pool with volumes is not deleted', () => {
    home.cli('pool', 'create', 'mem', '--driver', 'memory')
    home.cli('volume', 'create', 'in-memory', '--size', '1M', '--pool', 'mem')
    expect(home.fail('pool', 'delete', 'mem')).toBe('POOL_NOT_EMPTY')
    home.cli('volume', 'delete', 'in-memory')
    home.cli('pool', 'reclaim', 'mem')
    home.cli('pool', 'delete', 'mem')
  })
})

describe('volumes', () => {
  test('a volume is made, shown by name and id, renamed, resized and deleted', () => {
    const id = home.cli('volume', 'create', 'life', '--size', '10G')
    expect(id).toMatch(/^[0-9a-f-]{36}$/)
    expect(home.json<Volume>('volume', 'show', 'life')).toMatchObject({
      id,
      name: 'life',
      status: 'available',
      sizeBytes: 10 * 1024 * mib,
      pool: 'default',
      attachments: [],
      parent: null,
      usedBytes: 0,
      sharedBytes: 0,
    })
    home.cli('volume', 'rename', 'life', 'afterlife')
    expect(home.json<Volume>('volume', 'show', id).name).toBe('afterlife')
    home.cli('volume', 'resize', 'afterlife', '20G')
    expect(home.fail('volume', 'resize', 'afterlife', '1G')).toBe('SHRINK_NEEDS_FORCE')
    home.cli('volume', 'resize', 'afterlife', '1G', '--force')
    expect(home.json<Volume>('volume', 'show', id).sizeBytes).toBe(1024 * mib)
    expect(home.cli('volume', 'show', id)).toContain('1 GiB')
    home.cli('volume', 'delete', id)
    expect(home.fail('volume', 'show', 'afterlife')).toBe('VOLUME_NOT_FOUND')
  })

  test('sizes out of range or unreadable, and names that cannot be, change nothing', () => {
    const before = home.json<Volume[]>('volume', 'list').length
    for (const size of ['0', '4095', '5000', '-1', '10X', 'big', '513T', '99999999999999999999', '1.0000001K']) {
      const result = home.run('volume', 'create', 'bad', `--size=${size}`)
      expect(result, size).toMatchObject({ exitCode: 1, stdout: '', stderr: expect.stringContaining('SIZE_INVALID') })
    }
    expect(home.fail('volume', 'create', 'bad')).toBe('ARGUMENT_INVALID')
    for (const name of ['', 'a/b', 'a@b', 'x'.repeat(256), 'line\nfeed', absentId]) {
      expect(home.fail('volume', 'create', name, '--size', '1M'), name).toBe('NAME_INVALID')
    }
    expect(home.fail('volume', 'create', 'bad', '--size', '1M', '--pool', 'nowhere')).toBe('POOL_NOT_FOUND')
    expect(home.fail('volume', 'create', 'bad', '--from', 'image:nothing')).toBe('IMAGE_NOT_FOUND')
    expect(home.fail('volume', 'create', 'bad', '--from', 'snapshot:a@b')).toBe('VOLUME_NOT_FOUND')
    expect(home.fail('volume', 'create', 'bad', '--from', 'floppy:a')).toBe('ARGUMENT_INVALID')
    expect(home.fail('volume', 'create', 'bad', '--size', '1M', '--project', 'nobody')).toBe('PROJECT_NOT_FOUND')
    expect(home.json<Volume[]>('volume', 'list')).toHaveLength(before)
  })

  test('names that are awkward in a URL or a shell work', () => {
    for (const name of ['with space', 'ünïcode ☃', 'per%20cent', 'a?b=c&d', "quote's", '..dots', 'x'.repeat(255)]) {
      const id = home.cli('volume', 'create', name, '--size', '4096')
      expect(home.json<Volume>('volume', 'show', name).id, name).toBe(id)
      home.cli('volume', 'delete', name)
    }
  })

  test('a duplicate name and an unknown volume are refused', () => {
    home.cli('volume', 'create', 'twin', '--size', '1M')
    expect(home.fail('volume', 'create', 'twin', '--size', '1M')).toBe('NAME_TAKEN')
    home.cli('volume', 'create', 'other', '--size', '1M')
    expect(home.fail('volume', 'rename', 'other', 'twin')).toBe('NAME_TAKEN')
    for (const args of [['show'], ['delete'], ['attach'], ['detach']])
      expect(home.fail('volume', ...args, 'nobody')).toBe('VOLUME_NOT_FOUND')
    expect(home.fail('volume', 'resize', 'nobody', '1G')).toBe('VOLUME_NOT_FOUND')
    expect(home.fail('volume', 'rename', 'nobody', 'x')).toBe('VOLUME_NOT_FOUND')
    expect(home.fail('volume', 'show', absentId)).toBe('VOLUME_NOT_FOUND')
    home.cli('volume', 'delete', 'twin')
    home.cli('volume', 'delete', 'other')
  })

  test('an attached volume can be written, grown and cloned, and not deleted, shrunk or attached otherwise', async () => {
    home.cli('volume', 'create', 'work', '--size', '64M')
    const uri = home.cli('volume', 'attach', 'work', '--format', 'uri')
    expect(uri).toMatch(/^nbd\+unix:\/\/\/[0-9a-f-]{36}\?socket=\//)
    expect(home.cli('volume', 'attach', 'work', '--format', 'uri')).toBe(uri)
    expect(home.cli('volume', 'attach', 'work')).toBe(uri)
    expect(home.json<{ uri: string }>('volume', 'attach', 'work').uri).toBe(uri)

    const client = await connect(uri)
    await client.write(mib, new Uint8Array(mib).fill(1))
    await client.flush()
    expect(home.json<Volume>('volume', 'show', 'work')).toMatchObject({
      status: 'in-use',
      attachments: [{ protocol: 'nbd', uri, readOnly: false }],
    })
    expect(home.fail('volume', 'delete', 'work')).toBe('VOLUME_IN_USE')
    expect(home.fail('volume', 'attach', 'work', '--read-only')).toBe('VOLUME_IN_USE')
    expect(home.fail('volume', 'resize', 'work', '32M', '--force')).toBe('VOLUME_IN_USE')
    home.cli('volume', 'resize', 'work', '128M')
    home.cli('volume', 'create', 'copy', '--from', 'volume:work')
    expect(home.json<Volume>('volume', 'show', 'copy').sizeBytes).toBe(128 * mib)

    const second = home.json<{ uri: string; readOnly: boolean }>('volume', 'attach', 'work', '--read-only', '--shared')
    expect(second.readOnly).toBe(true)
    const reader = await connect(second.uri)
    expect(await reader.read(mib, 4)).toEqual(Buffer.from([1, 1, 1, 1]))
    await expect(reader.write(0, new Uint8Array(4096))).rejects.toMatchObject({ name: expect.stringContaining('Nbd') })
    await reader.disconnect()

    home.cli('volume', 'detach', 'work')
    await expect(client.read(0, 4096)).rejects.toMatchObject({ name: expect.stringContaining('Nbd') })
    expect(home.fail('volume', 'detach', 'work')).toBe('NOT_ATTACHED')
    home.cli('volume', 'delete', 'work')
    const copyUri = home.cli('volume', 'attach', 'copy', '--format', 'uri')
    const copy = await connect(copyUri)
    expect(await copy.read(mib, 4)).toEqual(Buffer.from([1, 1, 1, 1]))
    await copy.disconnect()
    home.cli('volume', 'detach', 'copy')
    home.cli('volume', 'delete', 'copy')
  })

  test.skipIf(!hasPrograms('qemu-io', 'qemu-img'))('what --format qemu prints is a block device of QEMU', () => {
    home.cli('volume', 'create', 'guest', '--size', '64M')
    const blockdev = JSON.parse(home.cli('volume', 'attach', 'guest', '--format', 'qemu')) as object
    const target = `json:${JSON.stringify(blockdev)}`
    succeed('qemu-io', runProgram('qemu-io', ['-c', 'write -P 5 1M 1M', '-c', 'flush', '-c', 'read -P 5 1M 1M', target]))
    const info = JSON.parse(succeed('qemu-img', runProgram('qemu-img', ['info', '--output=json', target]))) as object
    expect(info).toMatchObject({ 'virtual-size': 64 * mib, format: 'raw' })
    home.cli('volume', 'detach', 'guest')
    expect(JSON.parse(home.cli('volume', 'attach', 'guest', '--format', 'qemu', '--read-only'))).toMatchObject({
      'read-only': true,
    })
    home.cli('volume', 'detach', 'guest')
    home.cli('volume', 'delete', 'guest')
  })

  test('what --format libvirt prints names the export and the socket', () => {
    const id = home.cli('volume', 'create', 'domain', '--size', '64M')
    const xml = home.cli('volume', 'attach', 'domain', '--format', 'libvirt')
    expect(xml).toMatch(/^<disk type='network' device='disk'>[^]*<\/disk>$/)
    expect(xml).toContain(`<source protocol='nbd' name='${id}'>`)
    expect(xml).toContain(`<host transport='unix' socket='${join(home.path, 'nbd.sock')}'/>`)
    home.cli('volume', 'detach', 'domain')
    home.cli('volume', 'delete', 'domain')
  })

  test.skipIf(!hasPrograms('nbdinfo'))('nbdinfo lists attached volumes only', () => {
    const socket = `nbd+unix:///?socket=${join(home.path, 'nbd.sock')}`
    const shown = home.cli('volume', 'create', 'shown', '--size', '64M')
    const hidden = home.cli('volume', 'create', 'hidden', '--size', '64M')
    home.cli('volume', 'attach', 'shown')
    const list = succeed('nbdinfo', runProgram('nbdinfo', ['--list', '--json', socket]))
    expect(list).toContain(shown)
    expect(list).not.toContain(hidden)
    home.cli('volume', 'detach', 'shown')
    home.cli('volume', 'delete', 'shown')
    home.cli('volume', 'delete', 'hidden')
  })
})

describe('snapshots', () => {
  test('a snapshot keeps what was, also of several volumes at once, and a rollback brings it back', async () => {
    home.cli('volume', 'create', 'a', '--size', '64M')
    home.cli('volume', 'create', 'b', '--size', '64M')
    const client = await connect(home.cli('volume', 'attach', 'a', '--format', 'uri'))
    await client.write(0, new Uint8Array(4096).fill(1))
    const ids = home.cli('snapshot', 'create', 'a@one', 'b@one').split('\n')
    expect(ids).toHaveLength(2)
    await client.write(0, new Uint8Array(8192).fill(2))
    await client.flush()
    home.cli('snapshot', 'create', 'a@two')
    expect(home.json<{ name: string }[]>('snapshot', 'list', 'a').map(({ name }) => name)).toEqual(['one', 'two'])
    expect(home.cli('snapshot', 'list', 'a')).toContain('two')
    expect(home.json('snapshot', 'diff', 'a@one', 'a@two')).toEqual([{ offsetBytes: 0, lengthBytes: 8192, kind: 'data' }])
    expect(home.json('snapshot', 'diff', 'a@two', 'a')).toEqual([])
    expect(home.json('snapshot', 'diff', 'a@one')).toEqual([{ offsetBytes: 0, lengthBytes: 8192, kind: 'data' }])
    expect(home.fail('snapshot', 'rollback', 'a@one')).toBe('VOLUME_IN_USE')
    await client.disconnect()
    home.cli('volume', 'detach', 'a')
    home.cli('snapshot', 'rollback', 'a@one')
    const after = await connect(home.cli('volume', 'attach', 'a', '--format', 'uri'))
    expect(await after.read(0, 8192)).toEqual(Buffer.concat([Buffer.alloc(4096, 1), Buffer.alloc(4096)]))
    await after.disconnect()
    home.cli('volume', 'detach', 'a')

    home.cli('volume', 'create', 'from-two', '--from', 'snapshot:a@two')
    expect(home.fail('volume', 'delete', 'a')).toBe('VOLUME_HAS_SNAPSHOTS')
    home.cli('snapshot', 'delete', 'a@two')
    home.cli('volume', 'delete', 'a', '--with-snapshots')
    home.cli('snapshot', 'delete', ids[1] ?? '')
    for (const name of ['b', 'from-two']) home.cli('volume', 'delete', name)
  })

  test('errors name what was wrong', () => {
    home.cli('volume', 'create', 'v', '--size', '1M')
    home.cli('snapshot', 'create', 'v@s')
    expect(home.fail('snapshot', 'create', 'v@s')).toBe('NAME_TAKEN')
    expect(home.fail('snapshot', 'create', 'nobody@s')).toBe('VOLUME_NOT_FOUND')
    expect(home.fail('snapshot', 'create', 'v@t', 'nobody@t')).toBe('VOLUME_NOT_FOUND')
    expect(home.fail('snapshot', 'create', 'v')).toBe('NAME_INVALID')
    expect(home.fail('snapshot', 'delete', 'v@t')).toBe('SNAPSHOT_NOT_FOUND')
    expect(home.fail('snapshot', 'rollback', 'v@t')).toBe('SNAPSHOT_NOT_FOUND')
    expect(home.fail('snapshot', 'diff', 'v@s', 'v@t')).toBe('SNAPSHOT_NOT_FOUND')
    expect(home.fail('snapshot', 'list', 'nobody')).toBe('VOLUME_NOT_FOUND')
    expect(home.fail('snapshot', 'delete', absentId)).toBe('SNAPSHOT_NOT_FOUND')
    home.cli('volume', 'delete', 'v', '--with-snapshots')
  })
})

describe('images', () => {
  test('a raw file is imported with its holes, becomes a volume, and is exported byte for byte', async () => {
    const source = join(home.path, 'disk.img')
    await writeFile(source, Buffer.alloc(3 * mib, 9))
    await truncate(source, 40 * mib + 512)
    const id = home.runWith({ cwd: home.path }, 'image', 'import', 'disk', 'disk.img').stdout.trim()
    expect(home.json('image', 'show', 'disk')).toMatchObject({
      id,
      name: 'disk',
      status: 'active',
      sizeBytes: 40 * mib + 512,
      pool: 'default',
    })
    expect(home.json<Volume>('image', 'show', 'disk').usedBytes).toBeLessThan(4 * mib)
    expect(home.cli('image', 'list')).toContain('disk')
    expect(home.cli('image', 'show', id)).toContain('active')
    expect(home.fail('image', 'import', 'disk', source)).toBe('NAME_TAKEN')

    home.cli('volume', 'create', 'from-disk', '--from', 'image:disk')
    expect(home.json<Volume>('volume', 'show', 'from-disk')).toMatchObject({ sizeBytes: 40 * mib + 4096, parent: id })
    expect(home.fail('volume', 'create', 'small', '--from', 'image:disk', '--size', '4M')).toBe('SIZE_INVALID')

    home.cli('image', 'export', 'disk', join(home.path, 'out.img'))
    expect(await sameBytes(join(home.path, 'out.img'), await readFile(source))).toBe(true)
    expect(home.fail('image', 'export', 'disk', join(home.path, 'out.img'))).toBe('DESTINATION_EXISTS')
    home.cli('image', 'export', 'disk', join(home.path, 'out.img'), '--force')
    expect(home.fail('image', 'export', 'disk', '/does/not/exist/out.img')).toBe('DESTINATION_INVALID')

    home.cli('image', 'delete', 'disk')
    home.cli('volume', 'delete', 'from-disk')
    expect(home.fail('image', 'show', 'disk')).toBe('IMAGE_NOT_FOUND')
  })

  test('an image comes through standard input, from a pipe or a file', async () => {
    const bytes = Buffer.concat([Buffer.alloc(2 * mib, 3), Buffer.alloc(mib), Buffer.alloc(1000, 4)])
    const piped = home.runWith({ input: bytes }, 'image', 'import', 'piped', '-')
    expect(piped.exitCode, piped.stderr).toBe(0)
    home.cli('image', 'export', 'piped', join(home.path, 'piped.img'))
    expect(await sameBytes(join(home.path, 'piped.img'), bytes)).toBe(true)

    const script = 'exec "$1" image import redirected - <"$2"'
    const redirected = runProgram(
      'sh',
      ['-c', script, 'sh', join(import.meta.dirname, '../../atoll'), join(home.path, 'piped.img')],
      {
        env: { ATOLL_HOME: home.path },
      },
    )
    expect(redirected.exitCode, redirected.stderr).toBe(0)
    expect(home.json('image', 'show', 'redirected')).toMatchObject({ status: 'active', sizeBytes: bytes.length })
    expect(home.runWith({ input: bytes }, 'image', 'import', 'piped', '-').stderr).toContain('NAME_TAKEN')
    home.cli('image', 'delete', 'piped')
    home.cli('image', 'delete', 'redirected')
  })

  test('an image is made of a snapshot without copying', () => {
    home.cli('volume', 'create', 'template', '--size', '64M')
    home.cli('snapshot', 'create', 'template@clean')
    home.cli('image', 'create', 'golden', '--from', 'template@clean')
    expect(home.json('image', 'show', 'golden')).toMatchObject({ status: 'active', sizeBytes: 64 * mib })
    expect(home.fail('image', 'create', 'golden', '--from', 'template@clean')).toBe('NAME_TAKEN')
    expect(home.fail('image', 'create', 'x', '--from', 'template@dirty')).toBe('SNAPSHOT_NOT_FOUND')
    home.cli('image', 'delete', 'golden')
    home.cli('volume', 'delete', 'template', '--with-snapshots')
  })

  test.skipIf(!hasPrograms('qemu-img', 'qemu-io', 'setpriv'))(
    'a qcow2 file is detected and converted; one with a backing file is refused',
    () => {
      const path = join(home.path, 'disk.qcow2')
      succeed('qemu-img', runProgram('qemu-img', ['create', '-q', '-f', 'qcow2', path, '32M']))
      succeed('qemu-io', runProgram('qemu-io', ['-f', 'qcow2', '-c', 'write -P 6 1M 1M', path]))
      home.cli('image', 'import', 'converted', path)
      expect(home.json('image', 'show', 'converted')).toMatchObject({ status: 'active', sizeBytes: 32 * mib })
      home.cli('image', 'export', 'converted', join(home.path, 'converted.img'))
      succeed(
        'qemu-io',
        runProgram('qemu-io', ['-f', 'raw', '-c', 'read -P 6 1M 1M', '-c', 'read -P 0 0 1M', join(home.path, 'converted.img')]),
      )
      const compressed = join(home.path, 'converted.qcow2')
      home.cli('image', 'export', 'converted', compressed, '--format', 'qcow2', '--compress')
      succeed('qemu-img', runProgram('qemu-img', ['compare', '-f', 'qcow2', '-F', 'qcow2', path, compressed]))
      expect(home.fail('image', 'export', 'converted', compressed, '--format', 'qcow2')).toBe('DESTINATION_EXISTS')
      home.cli('image', 'delete', 'converted')

      const overlay = join(home.path, 'overlay.qcow2')
      succeed('qemu-img', runProgram('qemu-img', ['create', '-q', '-f', 'qcow2', '-b', path, '-F', 'qcow2', overlay]))
      expect(home.fail('image', 'import', 'overlay', overlay)).toBe('IMAGE_HAS_BACKING_FILE')
      expect(home.fail('image', 'show', 'overlay')).toBe('IMAGE_NOT_FOUND')
    },
  )

  test('sources that cannot be are refused and leave nothing', async () => {
    expect(home.fail('image', 'import', 'x', '/does/not/exist')).toBe('IMAGE_SOURCE_INVALID')
    expect(home.fail('image', 'import', 'x', 'ftp://127.0.0.1/disk.img')).toBe('IMAGE_SOURCE_INVALID')
    expect(home.fail('image', 'import', 'x', 'http://127.0.0.1:1/disk.img')).toBe('IMAGE_SOURCE_FORBIDDEN')
    await writeFile(join(home.path, 'empty.img'), '')
    expect(home.fail('image', 'import', 'x', join(home.path, 'empty.img'))).toBe('SIZE_INVALID')
    await writeFile(join(home.path, 'disk.vhdx'), Buffer.concat([Buffer.from('vhdxfile'), Buffer.alloc(mib)]))
    expect(home.fail('image', 'import', 'x', join(home.path, 'disk.vhdx'))).toBe('IMAGE_CORRUPT')
    expect(home.json<unknown[]>('image', 'list')).toEqual([])
  })
})

describe('jobs', () => {
  test('a job can be listed and shown; a finished one cannot be changed', async () => {
    await writeFile(join(home.path, 'small.img'), Buffer.alloc(mib, 1))
    const started = home.json<Job>('image', 'import', 'quick', join(home.path, 'small.img'), '--no-wait')
    await expect.poll(() => home.json<Job>('job', 'show', started.id).state).toBe('done')
    expect(home.json<Job[]>('job', 'list').map(({ id }) => id)).toContain(started.id)
    expect(home.cli('job', 'list')).toContain(started.id)
    expect(home.cli('job', 'show', started.id)).toContain('done')
    for (const verb of ['pause', 'resume', 'cancel']) expect(home.fail('job', verb, started.id)).toBe('JOB_STATE')
    for (const verb of ['show', 'pause', 'resume', 'cancel']) expect(home.fail('job', verb, absentId)).toBe('JOB_NOT_FOUND')
    home.cli('image', 'delete', 'quick')
  })
})
