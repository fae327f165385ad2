import { once } from 'node:events'
import { chmod, readdir, readFile, readlink } from 'node:fs/promises'
import { createServer, type Server } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import {
  makeSandboxDirectory,
  nbdImageName,
  requireQemuImg,
  runQemuImg,
  sandboxUserId,
  type SandboxDirectory,
} from './convert-sandbox.ts'
import { JobInterrupted } from './job-kind.ts'
import { ManualTimers, until } from './testing.ts'

const haveQemuImg = await requireQemuImg().then(
  () => true,
  () => false,
)

test('a missing qemu-img is named with its package', async () => {
  await expect(requireQemuImg('/nowhere')).rejects.toMatchObject({ code: 'QEMU_IMG_MISSING', values: { package: 'qemu-utils' } })
})

test('qemu-img is told the driver, never to open a backing file, and the size of a VHD that was inspected', () => {
  const named = (driver: Parameters<typeof nbdImageName>[0]): unknown =>
    JSON.parse(nbdImageName(driver, '/run/a,b:c.sock', 'name').slice('json:'.length))
  const file = { driver: 'nbd', server: { type: 'unix', path: '/run/a,b:c.sock' }, export: 'name' }
  expect(named('raw')).toEqual({ driver: 'raw', file })
  for (const driver of ['qcow2', 'vmdk', 'vdi', 'vhdx'] as const) expect(named(driver)).toEqual({ driver, backing: null, file })
  expect(named('vpc')).toEqual({ driver: 'vpc', backing: null, force_size_calc: 'current_size', file })
})

/** The processes named qemu-img that this process has started. */
async function ownQemuImg(): Promise<string[]> {
  const found: string[] = []
  for (const id of await readdir('/proc')) {
    const status = /^\d+$/.test(id) ? await readFile(`/proc/${id}/status`, 'utf8').catch(() => '') : ''
    if (status.startsWith('Name:\tqemu-img\n') && status.includes(`\nPPid:\t${process.pid}\n`)) found.push(id)
  }
  return found
}

describe.skipIf(!haveQemuImg)('qemu-img in its sandbox (package qemu-utils)', () => {
  let directory: SandboxDirectory
  let server: Server
  let name: string
  let timers: ManualTimers
  let controller: AbortController

  // A server that takes a connection and never says a word.
  beforeEach(async () => {
    timers = new ManualTimers()
    controller = new AbortController()
    directory = await makeSandboxDirectory(tmpdir())
    const path = join(directory.path, 'silent.sock')
    server = createServer().listen(path)
    await once(server, 'listening')
    await chmod(path, 0o666)
    name = nbdImageName('qcow2', path, 'nothing')
  })
  afterEach(async () => {
    controller.abort()
    server.close()
    await directory.remove()
  })

  const start = (): Promise<string> =>
    runQemuImg({
      arguments: ['info', '--output=json', name],
      workBytesMax: 1,
      signal: controller.signal,
      setTimer: timers.setTimer,
      activity: () => 0,
      stallTimeoutMs: 1000,
    })

  test('has no network, no privileges, no capabilities and few resources', async () => {
    const running = start()
    running.catch(() => undefined)
    await once(server, 'connection')
    const [id = ''] = await ownQemuImg()
    const status = await readFile(`/proc/${id}/status`, 'utf8')
    const field = (field: string): string => new RegExp(`^${field}:[ \\t]*(.*)$`, 'm').exec(status)?.[1] ?? ''
    expect(field('NoNewPrivs')).toBe('1')
    expect(field('CapEff')).toBe('0000000000000000')
    expect(field('CapPrm')).toBe('0000000000000000')
    const isRoot = process.geteuid?.() === 0
    expect(field('Uid').split(/\s+/)[0]).toBe(String(isRoot ? sandboxUserId : process.getuid?.()))
    expect(field('Groups').trim()).toBe(isRoot ? '' : field('Groups').trim())
    expect(await readlink(`/proc/${id}/ns/net`)).not.toBe(await readlink('/proc/self/ns/net'))
    const limits = await readFile(`/proc/${id}/limits`, 'utf8')
    expect(limits).toMatch(/^Max file size +0 +0 /m)
    expect(limits).toMatch(/^Max address space +2147483648 +2147483648 /m)
    expect(limits).toMatch(/^Max cpu time +\d+ +\d+ /m)
    controller.abort()
    await expect(running).rejects.toBeInstanceOf(JobInterrupted)
    await expect(ownQemuImg()).resolves.toEqual([])
  })

  test('is ended when nothing moves any more', async () => {
    const running = start()
    running.catch(() => undefined)
    await once(server, 'connection')
    timers.expireAll()
    await expect(running).rejects.toMatchObject({ code: 'IMAGE_CONVERT_FAILED' })
    await until(async () => (await ownQemuImg()).length === 0)
  })

  test('is not started for a job that was interrupted already', async () => {
    controller.abort()
    await expect(start()).rejects.toBeInstanceOf(JobInterrupted)
  })

  test('says why it failed', async () => {
    server.on('connection', (socket) => socket.destroy())
    await expect(start()).rejects.toMatchObject({
      code: 'IMAGE_CONVERT_FAILED',
      message: expect.stringContaining('qemu-img info'),
    })
  })
})
