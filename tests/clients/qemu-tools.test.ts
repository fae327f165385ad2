/** QEMU's tools without a guest against the real daemon: qemu-img, qemu-io and qemu-storage-daemon. */
import { rm } from 'node:fs/promises'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { hasPrograms } from '../cli/test-programs.ts'
import { BackgroundProcess } from './background-process.ts'
import { ClientStand, diskBytes, fileDifference, KiB, makeContent, mapTrouble, MiB, writeSparse } from './client-stand.ts'
import { PacedWriter } from './paced-writer.ts'
import { clientOutcome, runClient } from './run-client.ts'

let stand: ClientStand
beforeAll(async () => {
  stand = await ClientStand.create()
})
afterAll(async () => {
  await stand?.[Symbol.asyncDispose]()
})

// What a volume uses is counted from a listing that may be a second old.

/** Runs qemu-io's commands one after the other; a read whose pattern does not match fails. Returns what it printed. */
async function qemuIo(image: readonly string[], ...commands: string[]): Promise<string> {
  const output = await runClient('qemu-io', ...commands.flatMap((command) => ['-c', command]), ...image)
  expect(output).not.toMatch(/fail|error|differ/i)
  return output
}

describe.skipIf(!hasPrograms('qemu-img', 'qemu-io'))('qemu-img (package qemu-utils)', () => {
  test('sees a clone as its image: info, compare, map', async () => {
    const uri = stand.clone('seen')
    expect(JSON.parse(await runClient('qemu-img', 'info', '--output=json', '-f', 'raw', uri))).toMatchObject({
      'virtual-size': diskBytes,
    })
    await expect(runClient('qemu-img', 'compare', '-f', 'raw', '-F', 'raw', uri, stand.contentPath)).resolves.toMatch(/identical/)
    interface Range {
      start: number
      length: number
      zero: boolean
    }
    const map = JSON.parse(await runClient('qemu-img', 'map', '--output=json', '-f', 'raw', uri)) as Range[]
    const ranges = map.map(({ start, length, zero }) => ({ offset: start, length, zero }))
    expect(mapTrouble(ranges, stand.content, 64 * KiB)).toBeNull()

    await qemuIo(['-f', 'raw', uri], 'write -P 0x5a 30M 512')
    const compared = await clientOutcome('qemu-img', 'compare', '-f', 'raw', '-F', 'raw', uri, stand.contentPath)
    expect(compared.exitCode).toBe(1)
    expect(compared.output).toContain(`mismatch at offset ${30 * MiB}`)
  })

  test('converts a volume to qcow2 and back into another, each byte the same and zeros not stored', async () => {
    const [source, target] = [stand.clone('there'), stand.empty('back')]
    const qcow2 = stand.file('there.qcow2')
    await runClient('qemu-img', 'convert', '-f', 'raw', '-O', 'qcow2', '-c', '-W', '-m', '16', source, qcow2)
    await runClient('qemu-img', 'convert', '-n', '-f', 'qcow2', '-O', 'raw', '-W', '-m', '16', qcow2, target)
    await stand.crash()
    await expect(runClient('qemu-img', 'compare', '-f', 'raw', '-F', 'raw', target, stand.contentPath)).resolves.toMatch(
      /identical/,
    )
    expect(stand.usedBytes('back')).toBeLessThan(10 * MiB)
  })

  test('converts onto a clone that holds something else', async () => {
    const uri = stand.clone('replaced')
    const fresh = makeContent()
    const shifted = Buffer.concat([fresh.subarray(diskBytes / 2), fresh.subarray(0, diskBytes / 2)])
    await writeSparse(stand.file('replacement.raw'), shifted)
    await runClient('qemu-img', 'convert', '-n', '-f', 'raw', '-O', 'raw', stand.file('replacement.raw'), uri)
    await runClient('qemu-img', 'convert', '-f', 'raw', '-O', 'raw', uri, stand.file('replaced.raw'))
    expect(await fileDifference(stand.file('replaced.raw'), shifted)).toBeNull()
  })

  test('benches with 64 requests in flight and flushes among them, and every write is there', async () => {
    const uri = stand.clone('benched')
    const bench = ['bench', '-f', 'raw', '-t', 'none', '-d', '64', '-s', '4096', '-S', '12288']
    // 4 KiB of every 12, from 8 MiB on: 3000 writes end at 8 + 35.2 MiB.
    await runClient('qemu-img', ...bench, '-o', '8M', '-c', '3000', '-w', '--pattern=0xa5', '--flush-interval=128', uri)
    await runClient('qemu-img', ...bench, '-c', '3000', uri)
    await stand.crash()
    const expected = Buffer.from(stand.content)
    for (let index = 0; index < 3000; index++) expected.fill(0xa5, 8 * MiB + index * 12_288, 8 * MiB + index * 12_288 + 4096)
    await runClient('qemu-img', 'convert', '-f', 'raw', '-O', 'raw', uri, stand.file('benched.raw'))
    expect(await fileDifference(stand.file('benched.raw'), expected)).toBeNull()
  })
})

describe.skipIf(!hasPrograms('qemu-io'))('qemu-io (package qemu-utils)', () => {
  test('writes, zeroes and discards over a clone at any alignment, with FUA and flush, and a crash loses none of it', async () => {
    stand.clone('patterns')
    const image = ['-d', 'unmap', `json:${stand.home.cli('volume', 'attach', 'patterns', '--format', 'qemu')}`]
    await qemuIo(
      image,
      'write -P 0x11 0 1M',
      'write -P 0x22 4097 513',
      'write -f -P 0x33 2097151 3',
      'write -z 64k 64k',
      'write -z -u 1000 3000',
      'write -z -f 40M 1M',
      'discard 256k 64k',
      'discard 41M 1M',
      'aio_write -P 0x44 42M 1M',
      'aio_write -P 0x55 43M 1M',
      'aio_flush',
      'flush',
    )
    await stand.crash()
    const output = await qemuIo(
      image,
      'read -P 0x11 0 1000',
      'read -P 0 1000 3000',
      'read -P 0x11 4000 97',
      'read -P 0x22 4097 513',
      'read -P 0x11 4610 60926',
      'read -P 0 64k 64k',
      'read -P 0 256k 64k',
      'read -P 0x33 2097151 3',
      'read -P 0 40M 2M',
      'read -P 0x44 42M 1M',
      'read -P 0x55 43M 1M',
    )
    expect(output.match(/read \d+\/\d+ bytes/g)).toHaveLength(11)
    // What the patterns did not touch is the image's.
    await runClient('qemu-img', 'convert', '-f', 'raw', '-O', 'raw', stand.attach('patterns'), stand.file('patterns.raw'))
    const expected = Buffer.from(stand.content)
    expected.fill(0x11, 0, MiB).fill(0x22, 4097, 4610).fill(0x33, 2_097_151, 2_097_154)
    expected
      .fill(0, 64 * KiB, 128 * KiB)
      .fill(0, 1000, 4000)
      .fill(0, 256 * KiB, 320 * KiB)
    expected
      .fill(0, 40 * MiB, 42 * MiB)
      .fill(0x44, 42 * MiB, 43 * MiB)
      .fill(0x55, 43 * MiB, 44 * MiB)
    expect(await fileDifference(stand.file('patterns.raw'), expected)).toBeNull()
  })

  test('gets the space of what it discards back', async () => {
    const uri = stand.empty('thin')
    await qemuIo(['-f', 'raw', uri], 'write -P 1 0 32M', 'flush')
    await expect.poll(() => stand.usedBytes('thin')).toBe(32 * MiB)
    await qemuIo(['-f', 'raw', '-d', 'unmap', uri], 'discard 4M 20M', 'write -z -u 24M 4M', 'flush')
    await expect.poll(() => stand.usedBytes('thin')).toBe(8 * MiB)
    await qemuIo(['-f', 'raw', uri], 'read -P 1 0 4M', 'read -P 0 4M 24M', 'read -P 1 28M 4M')
  })

  test('zeroes a disk far larger than what is stored, 32 MiB with each request, and stores nothing for it', async () => {
    const uri = stand.empty('large', 256 * 1024 * MiB)
    await qemuIo(['-f', 'raw', uri], 'write -P 1 0 8M', 'write -P 2 255G 8M', 'flush')
    stand.home.cli('snapshot', 'create', 'large@before')
    await qemuIo(['-f', 'raw', '-t', 'writeback', uri], 'write -z -u -n 0 256G', 'flush')
    await qemuIo(['-f', 'raw', uri], 'read -P 0 0 8M', 'read -P 0 255G 8M')
    await expect.poll(() => stand.usedBytes('large')).toBe(0)
  })
})

describe.skipIf(!hasPrograms('qemu-storage-daemon', 'nbdcopy', 'qemu-io'))(
  'qemu-storage-daemon (package qemu-system-common)',
  () => {
    test('exports a volume again; its clients see a pause when our daemon is killed, and lose nothing', async () => {
      const uri = stand.clone('again')
      const blockdev = stand.home.cli('volume', 'attach', 'again', '--format', 'qemu')
      const { 'node-name': node } = JSON.parse(blockdev) as { 'node-name': string }
      const socket = stand.file('storage.sock')
      await using storage = new BackgroundProcess('qemu-storage-daemon', [
        '--blockdev',
        blockdev,
        '--nbd-server',
        `addr.type=unix,addr.path=${socket}`,
        '--export',
        `type=nbd,id=again,node-name=${node},name=again,writable=on`,
      ])
      const through = `nbd+unix:///again?socket=${socket}`
      await storage.until('listening', async () => (await clientOutcome('nbdinfo', through)).exitCode === 0)

      await runClient('nbdcopy', through, stand.file('through.raw'))
      expect(await fileDifference(stand.file('through.raw'), stand.content)).toBeNull()

      await using writer = new PacedWriter(through)
      await writer.isUnderWay()
      await stand.crash()
      await writer.succeeds()
      await runClient('nbdcopy', uri, stand.file('through.raw'))
      expect(await fileDifference(stand.file('through.raw'), writer.over(stand.content))).toBeNull()
      expect(await storage.end()).toBe(0)
      await rm(socket, { force: true })
    })
  },
)
