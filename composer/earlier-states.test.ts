import { afterEach, beforeEach, expect, test } from 'vitest'
import { EarlierStates } from './earlier-states.ts'
import { makeFolder, mebibyte, TestClient, TestDaemon } from './testing.ts'

let removeFolder: () => Promise<void>
let daemon: TestDaemon

beforeEach(async () => {
  const made = await makeFolder()
  removeFolder = made.remove
  daemon = await TestDaemon.open(made.folder)
})
afterEach(async () => {
  await daemon.stop()
  await removeFolder()
})

test('an export knows the snapshots of its volume by name, those that come later too', async () => {
  const { composer } = daemon
  const { id } = await composer.volumes.create({ name: 'disk', sizeBytes: mebibyte })
  await composer.volumes.attach('disk')
  const { changes } = composer.exports.get(id)!
  await expect(changes!.list()).resolves.toEqual([])
  const client = new TestClient(composer, id)
  await client.device.write(0, Buffer.from('monday'))
  const { snapshots } = await composer.snapshots.create(['disk@monday'])
  await expect(changes!.list()).resolves.toEqual(['monday'])
  const byName = await changes!.open('monday')
  const byId = await changes!.open(snapshots[0]!.id)
  expect(byName?.root()).toEqual(byId?.root())
  await expect(changes!.open('tuesday')).resolves.toBeNull()
  await composer.snapshots.delete('disk@monday')
  await expect(changes!.list()).resolves.toEqual([])
  await expect(changes!.open('monday')).resolves.toBeNull()
})

test('a name that several snapshots have stands for none of them; their ids do', async () => {
  const { composer } = daemon
  const { id } = await composer.volumes.create({ name: 'disk', sizeBytes: mebibyte })
  const first = await composer.snapshots.create(['disk@same'])
  const second = await composer.snapshots.create(['disk@same'], { allowDuplicateName: true })
  const ids = [first, second].map(({ snapshots }) => snapshots[0]!.id)
  await composer.volumes.attach('disk')
  const { changes } = composer.exports.get(id)!
  expect((await changes!.list()).toSorted()).toEqual(ids.toSorted())
  await expect(changes!.open('same')).resolves.toBeNull()
  expect(await changes!.open(ids[0]!)).not.toBeNull()
})

test('a snapshot can be compared with the others of its volume, an image with nothing', async () => {
  const { composer, catalog, mapper } = daemon
  const { id } = await composer.volumes.create({ name: 'disk', sizeBytes: mebibyte })
  await composer.snapshots.create(['disk@monday'])
  const { snapshots } = await composer.snapshots.create(['disk@tuesday'])
  const tuesday = new EarlierStates(catalog, mapper, { id: snapshots[0]!.id, kind: 'snapshot', volume_id: id })
  await expect(tuesday.list()).resolves.toEqual(['monday'])
  expect(await tuesday.open('monday')).not.toBeNull()
  const image = new EarlierStates(catalog, mapper, { id, kind: 'image', volume_id: null })
  await expect(image.list()).resolves.toEqual([])
})
