/** nbdkit's nbd plugin in front of the real daemon: nbdkit is our client, and its filters ask in ways that others do not. */
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { hasPrograms } from '../cli/test-programs.ts'
import { BackgroundProcess } from './background-process.ts'
import { ClientStand, diskBytes, fileDifference, makeContent, MiB, writeSparse } from './client-stand.ts'
import { PacedWriter } from './paced-writer.ts'
import { clientOutcome, runClient } from './run-client.ts'

describe.skipIf(!hasPrograms('nbdkit', 'nbdcopy', 'qemu-io'))('nbdkit in front of a volume (package nbdkit)', () => {
  let stand: ClientStand
  beforeAll(async () => {
    stand = await ClientStand.create()
  })
  afterAll(async () => {
    await stand?.[Symbol.asyncDispose]()
  })

  let count = 0
  /** Starts nbdkit on a socket of its own; returns the URI it serves. */
  async function nbdkit(
    uri: string,
    filters: readonly string[],
    ...parameters: string[]
  ): Promise<AsyncDisposable & { uri: string }> {
    count += 1
    const socket = stand.file(`nbdkit-${count}.sock`)
    const process = new BackgroundProcess('nbdkit', [
      '--foreground',
      '--exit-with-parent',
      '--unix',
      socket,
      ...filters.map((filter) => `--filter=${filter}`),
      'nbd',
      `uri=${uri}`,
      ...parameters,
    ])
    const front = `nbd+unix:///?socket=${socket}`
    try {
      await process.until('listening', async () => (await clientOutcome('nbdinfo', front)).exitCode === 0)
    } catch (error) {
      await process.end('SIGKILL')
      throw error
    }
    return { uri: front, [Symbol.asyncDispose]: async () => void (await process.end('SIGTERM')) }
  }

  async function contentOf(uri: string): Promise<string> {
    const path = stand.file('content.raw')
    await runClient('nbdcopy', uri, path)
    return path
  }

  test('passes content both ways, on its own connections and on a shared one', async () => {
    const uri = stand.clone('plain')
    const fresh = makeContent()
    await writeSparse(stand.file('fresh.raw'), fresh)
    {
      await using front = await nbdkit(uri, [])
      expect(await fileDifference(await contentOf(front.uri), stand.content)).toBeNull()
      await runClient('nbdcopy', '--connections=4', '--flush', stand.file('fresh.raw'), front.uri)
    }
    await using front = await nbdkit(uri, [], 'shared=true')
    expect(await fileDifference(await contentOf(front.uri), fresh)).toBeNull()
    expect(await fileDifference(await contentOf(uri), fresh)).toBeNull()
  })

  let filteredCount = 0
  // What the filter makes of the requests, and what of the volume it shows.
  test.each([
    ['multi-conn switched off', ['multi-conn'], ['multi-conn-mode=disable']],
    ['every request a multiple of 64 KiB', ['blocksize'], ['minblock=65536']],
    ['no request over 4 KiB', ['blocksize'], ['maxdata=4096', 'maxlen=4096']],
    ['zeros written as data', ['nozero'], ['zeromode=notrim']],
    ['FUA on every write', ['fua'], ['fuamode=force']],
    ['one request at a time', ['noparallel'], []],
    ['no status asked', ['noextents'], []],
    ['a writeback cache', ['cache'], ['cache=writeback']],
  ])('stores what is written through %s', async (_name, filters, parameters) => {
    filteredCount += 1
    const uri = stand.clone(`filtered-${filteredCount}`)
    const fresh = makeContent()
    const shifted = Buffer.concat([fresh.subarray(diskBytes / 2), fresh.subarray(0, diskBytes / 2)])
    await writeSparse(stand.file('shifted.raw'), shifted)
    {
      await using front = await nbdkit(uri, filters, ...parameters)
      expect(await fileDifference(await contentOf(front.uri), stand.content)).toBeNull()
      await runClient('nbdcopy', '--flush', stand.file('shifted.raw'), front.uri)
      expect(await fileDifference(await contentOf(front.uri), shifted)).toBeNull()
    }
    expect(await fileDifference(await contentOf(uri), shifted)).toBeNull()
  })

  test('finds each byte and each hole where checkwrite wants it, and leaves the volume alone under cow', async () => {
    const uri = stand.clone('checked')
    {
      // Its writes succeed only if the volume has that content already.
      await using front = await nbdkit(uri, ['checkwrite'])
      await runClient('nbdcopy', '--flush', stand.contentPath, front.uri)
      await writeSparse(stand.file('other.raw'), makeContent())
      expect((await clientOutcome('nbdcopy', stand.file('other.raw'), front.uri)).exitCode).not.toBe(0)
    }
    {
      await using front = await nbdkit(uri, ['cow'])
      await runClient('qemu-io', '-f', 'raw', '-c', 'write -P 7 1M 8M', '-c', 'read -P 7 1M 8M', front.uri)
    }
    expect(await fileDifference(await contentOf(uri), stand.content)).toBeNull()
  })

  test('shows a part of a volume, and writes stay inside of it', async () => {
    const uri = stand.clone('part')
    {
      await using front = await nbdkit(uri, ['offset'], `offset=${40 * MiB + 512}`, `range=${MiB}`)
      expect(await fileDifference(await contentOf(front.uri), stand.content.subarray(40 * MiB + 512, 41 * MiB + 512))).toBeNull()
      await runClient('qemu-io', '-f', 'raw', '-c', `write -P 9 0 ${MiB}`, '-c', 'flush', front.uri)
    }
    const expected = Buffer.from(stand.content).fill(9, 40 * MiB + 512, 41 * MiB + 512)
    expect(await fileDifference(await contentOf(uri), expected)).toBeNull()
  })

  test('opens us again after kill -9 with the retry filter, and its client notices nothing', async () => {
    const uri = stand.clone('retried')
    await using front = await nbdkit(uri, ['retry'], 'retries=300', 'retry-delay=1', 'retry-exponential=no')
    await using writer = new PacedWriter(front.uri)
    await writer.isUnderWay()
    await stand.crash()
    await writer.succeeds()
    expect(await fileDifference(await contentOf(uri), writer.over(stand.content))).toBeNull()
  })
})
