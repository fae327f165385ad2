import { cp } from 'node:fs/promises'
import { join } from 'node:path'
import { describe, expect, test, vi } from 'vitest'
import { TestHome } from '../test-home.ts'
import { attach, expectOnlyBroken, expectServed, layersOf, makeOther, mebibyte, pattern, type Finding } from './broken-home.ts'

// Every step starts a process, and other tests run beside this.
vi.setConfig({ testTimeout: 180_000 })

const look = (home: TestHome): Finding[] =>
  // Exit code 1 says that there are errors; the document is there either way.
  (JSON.parse(home.run('check', '--json').stdout) as { findings: Finding[] }).findings

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
    expect(look(home)).toContainEqual(
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
    expect(look(home).filter(({ severity }) => severity === 'error')).toEqual([])
  })
})
