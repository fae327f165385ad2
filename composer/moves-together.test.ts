/** Moves over the real mapper: two clones that share a layer, and what is shown meanwhile. */
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { makeFolder, mebibyte, TestClient, TestDaemon } from './testing.ts'

test('two clones of one image that move at once copy what they share once, and share it afterwards', async () => {
  const { folder, remove } = await makeFolder()
  const daemon = await TestDaemon.open(folder)
  try {
    const { composer } = daemon
    const settings = { 'low-space': 'off' }
    const other = await composer.pools.create({
      name: 'other',
      driver: 'file',
      options: { path: join(folder, 'other') },
      settings,
    })
    await composer.volumes.create({ name: 'base', sizeBytes: 8 * mebibyte })
    const client = new TestClient(composer, (await composer.volumes.attach('base')).exportName)
    await client.device.write(0, Buffer.alloc(4 * mebibyte, 7))
    await client.close()
    await composer.volumes.detach('base')
    const names = ['one', 'two']
    for (const name of names) await composer.volumes.create({ name, from: 'volume:base' })
    await composer.volumes.delete('base')

    const started = await Promise.all(names.map(async (name) => await composer.moves.migrate(name, { to: 'other' })))
    const ended = await Promise.all(started.map(async ({ job }) => await composer.jobs.wait(job?.id ?? '')))
    expect(ended.map(({ state, error }) => ({ state, error }))).toEqual(names.map(() => ({ state: 'done', error: null })))
    const copied = ended.map(({ result }) => Number(result?.['copiedBytes']) + Number(result?.['offloadedBytes']))
    expect(copied.toSorted((a, b) => a - b)).toEqual([0, 4 * mebibyte])
    for (const name of names) {
      await expect(composer.volumes.show(name)).resolves.toMatchObject({ poolId: other.id, readsFrom: [], move: null })
      const reader = new TestClient(composer, (await composer.volumes.attach(name, { readOnly: true })).exportName)
      expect(Buffer.from(await reader.device.read(0, 4 * mebibyte)).equals(Buffer.alloc(4 * mebibyte, 7))).toBe(true)
      await reader.close()
      await composer.volumes.detach(name)
    }
    await daemon.mapper.reclaim(null)
    await expect(composer.pools.show('default')).resolves.toMatchObject({ storedBytes: 0, logicalBytes: 0 })
    expect((await composer.pools.show('other')).storedBytes).toBeLessThan(6 * mebibyte)
  } finally {
    await daemon.stop()
    await remove()
  }
})
