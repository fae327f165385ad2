import { unlinkSync } from 'node:fs'
import { join } from 'node:path'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { Bench, bytes, leaf, slot } from './test-bench.ts'

let bench: Bench
beforeEach(async () => {
  bench = await Bench.open({ files: true })
})
afterEach(async () => {
  await bench.close()
})

/** A volume with a snapshot, closed; the file of its sealed layer. */
async function sealedFile(): Promise<string> {
  const volume = await bench.volume('v', leaf)
  const device = await bench.attach(volume.id)
  await device.write(0, bytes(1, 16 * slot))
  await bench.snapshot(volume.id, 'first')
  await device.write(0, bytes(2, slot))
  await bench.restart()
  const sealed = await bench.inner.db.selectFrom('layers').select('id').where('state', '=', 'sealed').executeTakeFirstOrThrow()
  return join(bench.backend.folder ?? '', 'layers', `${sealed.id}.layer`)
}

test('a layer that is removed while a deep check runs is nothing to tell of', async () => {
  const file = await sealedFile()
  let isRemoved = false
  const onProgress = (): void => {
    if (!isRemoved) unlinkSync(file)
    isRemoved = true
  }
  const { findings } = await bench.mapper.check({ deep: true, subjects: ['layers'], onProgress })
  expect(isRemoved).toBe(true)
  expect(findings).toEqual([])
})

test('a deep check tells how much in sealed layers nothing refers to, and a reclaim frees it', async () => {
  await sealedFile()
  const [snapshot] = await bench.inner.db.selectFrom('resources').selectAll().where('kind', '=', 'snapshot').execute()
  await bench.mapper.deleteResource(snapshot?.id ?? '')
  const { findings } = await bench.mapper.check({ deep: true, subjects: ['layers'] })
  expect(findings.map(({ kind, message }) => [kind, message.split(' ')[0]])).toEqual([['layer-unreferenced-data', `${slot}`]])
  expect((await bench.mapper.reclaim(null)).freedBytes).toBe(slot)
  expect((await bench.mapper.check({ deep: true })).findings).toEqual([])
})
