import { randomBytes } from 'node:crypto'
import { open, readFile, writeFile } from 'node:fs/promises'
import { startNbdkit, startQemuNbd, type PeerProcess } from '@atoll/nbd-client/testing'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { hasPrograms } from '../cli/test-programs.ts'
import { ImageStand, mebibyte, nothingLeft, run } from './image-stand.ts'

const rawBytes = 40 * mebibyte

describe('an image of a remote NBD export', () => {
  let stand: ImageStand
  let raw: string
  let server: PeerProcess | undefined

  beforeEach(async () => {
    stand = await ImageStand.open({ copyStepBytes: 4 * mebibyte })
    server = undefined
    raw = stand.path('raw')
    const handle = await open(raw, 'w')
    await handle.truncate(rawBytes)
    for (const offsetBytes of [0, 9 * mebibyte - 100, 20 * mebibyte + 512, rawBytes - 512]) {
      await handle.write(randomBytes(512), 0, undefined, offsetBytes)
    }
    await handle.write(randomBytes(3 * mebibyte), 0, undefined, 30 * mebibyte)
    await handle.close()
  })
  afterEach(async () => {
    await server?.stop()
    await stand.remove()
  })

  async function imported(url: string): Promise<void> {
    const job = await stand.composer.images.importUrl({ name: 'image', url })
    await expect(stand.composer.jobs.wait(job.id)).resolves.toMatchObject({
      state: 'done',
      error: null,
      progressBytes: rawBytes,
      totalBytes: rawBytes,
    })
    expect((await stand.exported('image')).equals(await readFile(raw))).toBe(true)
    expect((await stand.composer.pools.show('default')).storedBytes).toBeLessThan(5 * mebibyte)
  }

  test.skipIf(!hasPrograms('qemu-nbd'))('has its bytes and its holes: qemu-nbd, with and without a name', async () => {
    const socket = stand.path('qemu.sock')
    server = await startQemuNbd(socket, raw, ['-r', '-x', 'disk name'])
    await imported(`nbd+unix:///disk%20name?socket=${socket}`)
    await expect(
      stand.composer.images.importUrl({ name: 'other', url: `nbd+unix:///absent?socket=${socket}` }),
    ).rejects.toMatchObject({ code: 'IMAGE_FETCH_FAILED' })
  })

  test.skipIf(!hasPrograms('nbdkit'))(
    'has its bytes where the server knows no block status, and where requests must be short',
    async () => {
      const socket = stand.path('nbdkit.sock')
      const filters = ['--filter=blocksize-policy', '--filter=nozero']
      const policy = [
        'blocksize-minimum=512',
        'blocksize-preferred=4096',
        'blocksize-maximum=65536',
        'blocksize-error-policy=error',
      ]
      server = await startNbdkit(socket, ['-r', '--no-sr', ...filters, 'file', raw, ...policy])
      await imported(`nbd+unix:///?socket=${socket}`)
    },
  )

  test.skipIf(!hasPrograms('nbdkit'))('goes on where it was after a pause and a restart of the daemon', async () => {
    const socket = stand.path('nbdkit.sock')
    server = await startNbdkit(socket, ['-r', '--filter=rate', 'file', raw, 'rate=100M'])
    const job = await stand.composer.images.importUrl({ name: 'image', url: `nbd+unix:///?socket=${socket}` })
    const stepped = Promise.withResolvers<void>()
    const waiting = stand.composer.jobs.wait(job.id, {
      onProgress: ({ progressBytes }) => void (progressBytes > 0 && stepped.resolve()),
    })
    waiting.catch(() => undefined)
    await stepped.promise
    await stand.composer.jobs.pause(job.id)
    await stand.stop()
    await stand.start()
    await stand.composer.jobs.resume(job.id)
    await expect(stand.composer.jobs.wait(job.id)).resolves.toMatchObject({ state: 'done', error: null })
    expect((await stand.exported('image')).equals(await readFile(raw))).toBe(true)
  })

  test.skipIf(!hasPrograms('qemu-nbd', 'qemu-img'))('is never probed: a disk that begins like qcow2 is a disk', async () => {
    const inner = stand.path('inner')
    await run('qemu-img', ['convert', '-f', 'raw', '-O', 'qcow2', raw, inner])
    const socket = stand.path('qemu.sock')
    server = await startQemuNbd(socket, inner, ['-r'])
    const url = `nbd+unix:///?socket=${socket}`
    const job = await stand.composer.images.importUrl({ name: 'image', url })
    await expect(stand.composer.jobs.wait(job.id)).resolves.toMatchObject({ state: 'done' })
    expect((await stand.exported('image')).equals(await readFile(inner))).toBe(true)
    await expect(stand.composer.images.importUrl({ name: 'other', url, format: 'qcow2' })).rejects.toMatchObject({
      code: 'IMAGE_FORMAT_UNSUPPORTED',
    })
  })

  test('is refused when there is no server, and when the URL is none, and leaves nothing', async () => {
    await writeFile(stand.path('nobody'), '')
    for (const url of [`nbd+unix:///x?socket=${stand.path('nobody')}`, 'nbd://127.0.0.1:1/x']) {
      await expect(stand.composer.images.importUrl({ name: 'image', url })).rejects.toMatchObject({ code: 'IMAGE_FETCH_FAILED' })
    }
    for (const url of ['nbd://', 'nbd+unix:///x', 'nbd+tls://host/x']) {
      await expect(stand.composer.images.importUrl({ name: 'image', url })).rejects.toMatchObject({
        code: 'IMAGE_SOURCE_INVALID',
      })
    }
    await expect(stand.left()).resolves.toEqual(nothingLeft)
  })
})
