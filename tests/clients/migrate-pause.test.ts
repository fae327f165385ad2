/** A client goes on while its volume moves to another pool and back: nothing fails, and how long it waits is printed. */
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { TestHome } from '../test-home.ts'
import { RequestTimes } from './request-times.ts'
import { writeIncompressible } from './write-incompressible.ts'

test('a client of a volume that moves there and back sees no error and no other bytes', async () => {
  await using home = await TestHome.create()
  await home.start()
  home.cli('pool', 'create', 'other', '--driver', 'file', '--option', `path=${join(home.path, 'pools', 'other')}`)
  const source = join(home.path, 'base.raw')
  await writeIncompressible(source, 64)
  home.cli('image', 'import', 'base', source, '--format', 'raw')
  home.cli('volume', 'create', 'disk', '--from', 'image:base')
  home.cli('image', 'delete', 'base')
  const client = await RequestTimes.start(home.cli('volume', 'attach', 'disk', '--format', 'uri'))
  try {
    for (const snapshot of ['one', 'two']) await home.snapshotMeanwhile(`disk@${snapshot}`)
    client.take()
    await home.jsonMeanwhile('volume', 'list')
    const before = client.take()
    for (const target of ['other', 'default']) {
      const moved = await home.jsonMeanwhile<{ job: { result: { pauseMs: number } } }>(
        'migrate',
        'disk',
        '--to',
        target,
        '--wait',
      )
      console.log(`to ${target}: slowest requests`, client.take(), 'before', before, 'of the job', moved.job.result)
      const shown = await home.jsonMeanwhile<{ pool: string; readsFrom: string[] }>('volume', 'show', 'disk')
      expect(shown).toMatchObject({ pool: target, readsFrom: [], move: null })
    }
  } finally {
    await client.stop()
  }
  for (const pool of ['default', 'other']) home.cli('pool', 'reclaim', pool)
  expect(home.json<{ storedBytes: number }>('pool', 'show', 'other').storedBytes).toBe(0)
})
