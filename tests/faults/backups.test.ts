import { cp } from 'node:fs/promises'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { TestHome } from '../test-home.ts'
import { attach, check, expectOnlyBroken, expectServed, layersOf, makeOther, mebibyte, pattern } from './broken-home.ts'

describe('a backup of the catalog', () => {
  test('is made while volumes are written, and restored tells which of them went on, and the replaced one brings them back', async () => {
    await using home = await TestHome.create()
    await home.start()
    await makeOther(home)
    home.cli('volume', 'create', 'disk', '--size', '16M')
    home.cli('snapshot', 'create', 'disk@base')
    const client = await attach(home, 'disk')
    await client.write(0, pattern(1, mebibyte))
    await client.flush()
    const backup = join(home.path, 'backup')
    const made = await home.jsonMeanwhile<{ generation: number; sha256: string }>('catalog', 'backup', backup)
    expect(made).toMatchObject({ generation: 1, sha256: expect.stringMatching(/^[0-9a-f]{64}$/) as string })
    expect(home.fail('catalog', 'backup', backup)).toBe('DESTINATION_EXISTS')
    expect(home.fail('catalog', 'restore', backup)).toBe('HOME_LOCKED')
    await client.write(2 * mebibyte, pattern(2, mebibyte))
    await client.disconnect()
    home.cli('snapshot', 'create', 'disk@later')
    const written = layersOf(home, 'disk').active
    await home.end()

    expect(home.fail('catalog', 'restore', join(home.path, 'log'))).toBe('CATALOG_BACKUP_INVALID')
    const restored = home.json<{ replacedPath: string; generation: number }>('catalog', 'restore', backup)
    expect(restored.generation).toBe(1)
    await home.start()
    await expectOnlyBroken(home, 'disk', 'CATALOG_BEHIND')
    expect(check(home, 'check')).toContainEqual(
      expect.objectContaining({ severity: 'error', kind: 'catalog-behind', message: expect.stringContaining('disk') as string }),
    )
    expect(home.run('check').exitCode).toBe(1)
    expect(home.json<{ generation: number }>('catalog', 'backup', join(home.path, 'another')).generation).toBeGreaterThan(1)
    await home.end()

    await cp(restored.replacedPath, join(home.path, 'catalog.db'))
    await home.start()
    expect(layersOf(home, 'disk').active).toBe(written)
    await using back = await attach(home, 'disk')
    expect(await back.read(0, mebibyte)).toEqual(pattern(1, mebibyte))
    expect(await back.read(2 * mebibyte, mebibyte)).toEqual(pattern(2, mebibyte))
    await expectServed(home)
    expect(check(home, 'check').filter(({ severity }) => severity === 'error')).toEqual([])
  })

  test('restored uses nothing that was deleted since, and everything else', async () => {
    await using home = await TestHome.create()
    await home.start()
    await makeOther(home)
    const write = async (volume: string, at: number, seed: number): Promise<void> => {
      await using client = await attach(home, volume)
      await client.write(at, pattern(seed, mebibyte))
      await client.flush()
    }
    const read = async (resource: string): Promise<Buffer> => {
      await using client = await attach(home, resource)
      return Buffer.from(await client.read(0, mebibyte))
    }
    home.cli('volume', 'create', 'disk', '--size', '16M')
    await write('disk', 0, 1)
    home.cli('snapshot', 'create', 'disk@kept')
    await write('disk', 0, 2)
    home.cli('snapshot', 'create', 'disk@doomed')
    await write('disk', 0, 3)
    home.cli('snapshot', 'create', 'disk@last')
    home.cli('image', 'create', 'golden', '--from', 'disk@kept')
    home.cli('volume', 'create', 'clone', '--from', 'image:golden')
    home.cli('volume', 'create', 'gone', '--from', 'snapshot:disk@kept')
    for (const volume of ['disk', 'other']) home.cli('volume', 'detach', volume)
    const backup = join(home.path, 'backup')
    home.cli('catalog', 'backup', backup)

    home.cli('snapshot', 'delete', 'disk@doomed')
    home.cli('volume', 'delete', 'gone')
    // Attached and not written: nothing of it is newer but its epoch.
    expect(await read('clone')).toEqual(pattern(1, mebibyte))
    home.cli('volume', 'detach', 'clone')
    home.cli('volume', 'create', 'made', '--size', '16M')
    await write('made', 0, 4)
    home.cli('pool', 'reclaim', 'default')
    // Those that the deletes have started by themselves may have been faster.
    const jobs = home.json<{ kind: string; result: { freedBytes: number } | null }[]>('job', 'list')
    const freed = jobs.filter(({ kind }) => kind === 'reclaim').map(({ result }) => result?.freedBytes ?? 0)
    expect(freed.reduce((sum, bytes) => sum + bytes, 0)).toBeGreaterThanOrEqual(mebibyte)
    await home.end()
    home.cli('catalog', 'restore', backup)

    for (const life of ['first', 'second']) {
      await home.start()
      const older = check(home, 'check').find(({ kind }) => kind === 'catalog-older')
      expect(older).toMatchObject({ severity: 'error', message: expect.stringContaining('2 resources') as string })
      for (const command of [
        ['volume', 'attach', 'disk@doomed'],
        ['volume', 'attach', 'gone'],
        ['volume', 'create', 'copy', '--from', 'snapshot:disk@doomed'],
        ['image', 'create', 'copy', '--from', 'disk@doomed'],
        ['snapshot', 'rollback', 'disk@doomed'],
        ['snapshot', 'create', 'gone@now'],
      ]) {
        expect(home.fail(...command), command.join(' ')).toBe('CATALOG_BEHIND')
      }
      expect(await read('disk@kept')).toEqual(pattern(1, mebibyte))
      expect(await read('disk@last')).toEqual(pattern(3, mebibyte))
      expect(await read('clone')).toEqual(pattern(1, mebibyte))
      expect(await read('disk')).toEqual(pattern(3, mebibyte))
      expect(home.fail('volume', 'show', 'made')).toBe('VOLUME_NOT_FOUND')
      // What is made now is this catalog's own.
      home.cli('volume', 'create', life, '--from', 'image:golden')
      expect(await read(life)).toEqual(pattern(1, mebibyte))
      await write(life, 0, 5)
      home.cli('snapshot', 'create', `${life}@now`)
      home.cli('pool', 'reclaim', 'default')
      expect(await read(`${life}@now`)).toEqual(pattern(5, mebibyte))
      home.cli('volume', 'detach', 'disk')
      await home.end()
    }
    await home.start()
    home.cli('snapshot', 'delete', 'disk@doomed')
    home.cli('volume', 'delete', 'gone')
    expect(await read('first@now')).toEqual(pattern(5, mebibyte))

    // The newer catalog is not coming back.
    const asked = home.run('pool', 'accept', 'default')
    expect([asked.exitCode, asked.stdout]).toEqual([1, expect.stringMatching(/nothing was changed[^]*volume made /)])
    expect(check(home, 'check').map(({ kind }) => kind)).toContain('catalog-older')
    const accepted = home.json<{ accepted: boolean; onlyInExport: { name: string }[] }>('pool', 'accept', 'default', '--yes')
    expect(accepted).toMatchObject({ accepted: true, onlyInExport: [expect.objectContaining({ name: 'made' })] })
    expect(home.fail('pool', 'accept', 'default', '--yes')).toBe('POOL_NOT_AHEAD')
    expect(home.json<{ export: { state: string } }>('pool', 'show', 'default').export.state).toBe('current')
    expect(check(home, 'check').map(({ kind }) => kind)).not.toContain('catalog-older')
    expect(await read('disk@kept')).toEqual(pattern(1, mebibyte))
    expect(await read('disk')).toEqual(pattern(3, mebibyte))
  })
})
