/** Layers that share blocks with those of another pool of the same file system, on real ones that can. */
import { randomUUID } from 'node:crypto'
import { appendFile, mkdtemp, rm, statfs } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { Engine, type FillReport, slotBytes, type Store } from '@atoll/native'
import { fileDriver, type PoolHandle } from '@atoll/southbound'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { FormattedDisk, type SharingKind, whyNoFormattedDisk } from './formatted-disk.ts'

const mebibyte = 2 ** 20
const layerId = '00000000-0000-4000-8000-000000000001'
const kinds = (['xfs', 'btrfs'] satisfies SharingKind[]).map(async (kind) => [kind, await whyNoFormattedDisk(kind)] as const)

for (const [kind, reason] of await Promise.all(kinds)) {
  if (reason !== null) console.log(`the tests of shared blocks are skipped: ${reason}`)

  describe.skipIf(reason !== null)(`pools on one ${kind}`, () => {
    let engine: Engine
    let elsewhere: string

    beforeEach(async () => {
      engine = new Engine()
      elsewhere = await mkdtemp(join(tmpdir(), 'atoll-offload-'))
    })

    afterEach(async () => {
      await engine.close()
      await rm(elsewhere, { recursive: true })
    })

    const openPool = (path: string): Promise<PoolHandle> =>
      fileDriver.open({
        engine,
        poolId: randomUUID(),
        options: { path, reserve: '0' },
        catalogId: '11111111-1111-4111-8111-111111111111',
        ownerText: 'a test',
        now: () => 0,
      })

    /** A sealed layer of 40 MiB with a hole in the middle, whose file ends inside a slot. */
    async function makeLayer(store: Store, path: string): Promise<void> {
      await store.createLayer(layerId)
      const layer = { alias: 1, id: layerId, store }
      const spec = { volumeId: randomUUID(), sizeBytes: 64 * mebibyte, epoch: 1, map: engine.uniformMap(0), mapLsn: 0 }
      const { device } = await engine.openDevice({ ...spec, layers: [layer], active: 1, next: null })
      for (const at of [0, 8, 24, 32]) await device.write(at * mebibyte, new Uint8Array(8 * mebibyte).fill(at + 1))
      await device.close()
      await appendFile(join(path, 'layers', `${layerId}.layer`), new Uint8Array(100).fill(9))
      await store.syncLayer(layerId)
    }

    async function contentOf(store: Store, sizeBytes: number): Promise<Uint8Array> {
      const spec = { volumeId: randomUUID(), sizeBytes, epoch: 1, map: engine.uniformMap(1), mapLsn: 0 }
      const layers = [{ alias: 1, id: layerId, store }]
      const { device } = await engine.openDevice({ ...spec, layers, active: null, next: null })
      const content = await device.read(0, sizeBytes)
      await device.close()
      return content
    }

    const fill = (source: Store, target: Store, runs: Float64Array): Promise<FillReport> =>
      engine.fillPiece({
        source: { id: layerId, store: source },
        target: { id: layerId, store: target },
        runs,
        fromSlot: 0,
        maxBytes: 64 * mebibyte,
        maxMilliseconds: 60_000,
        offload: true,
      })

    test('share what lies in whole blocks, and copy the rest', async () => {
      await using disk = await FormattedDisk.make(kind)
      const [from, to] = [join(disk.path, 'from'), join(disk.path, 'to')]
      const [source, target] = [await openPool(from), await openPool(to)]
      expect(source.capabilities.offloadDomain).not.toBeNull()
      expect(target.capabilities.offloadDomain).toBe(source.capabilities.offloadDomain)
      await makeLayer(source.store, from)
      await target.createLayer(layerId)
      const { bavail: freeBefore, bsize } = await statfs(disk.path)

      const runs = Float64Array.of(0, 256, 1, 256, 256, 2, 1024, 15_360, 1)
      const report = await fill(source.store, target.store, runs)
      const offloadedBytes = (2 + 36 - 8) * mebibyte
      const zeroBytes = (512 + 15_360) * slotBytes - offloadedBytes - slotBytes
      expect(report).toEqual({ nextSlot: null, copiedBytes: slotBytes, offloadedBytes, zeroBytes, verifiedBytes: slotBytes })
      expect((freeBefore - (await statfs(disk.path)).bavail) * bsize).toBeLessThan(4 * mebibyte)

      const wanted = await contentOf(source.store, 41 * mebibyte)
      // Nobody refers to these.
      wanted.fill(0, 2 * mebibyte, 4 * mebibyte)
      expect(Buffer.compare(await contentOf(target.store, 41 * mebibyte), wanted)).toBe(0)
      // What becomes of one of them is nothing to the other.
      await source.punchExcept(layerId, new Float64Array())
      expect(Buffer.compare(await contentOf(target.store, 41 * mebibyte), wanted)).toBe(0)
      await Promise.all([source.close(), target.close()])
    })

    test('copy everything into a pool that is elsewhere', async () => {
      await using disk = await FormattedDisk.make(kind)
      const from = join(disk.path, 'from')
      const [source, target] = [await openPool(from), await openPool(elsewhere)]
      expect(target.capabilities.offloadDomain).not.toBe(source.capabilities.offloadDomain)
      await makeLayer(source.store, from)
      await target.createLayer(layerId)
      const report = await fill(source.store, target.store, Float64Array.of(0, 16_384, 1))
      expect(report).toMatchObject({ nextSlot: null, copiedBytes: 32 * mebibyte + slotBytes, offloadedBytes: 0 })
      const [content, wanted] = [await contentOf(target.store, 41 * mebibyte), await contentOf(source.store, 41 * mebibyte)]
      expect(Buffer.compare(content, wanted)).toBe(0)
      await Promise.all([source.close(), target.close()])
    })
  })
}
