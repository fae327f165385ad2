/** Two homes that share a catalog: one daemon is active, the other stands by and takes its place. */
import { once } from 'node:events'
import { mkdtemp, rm } from 'node:fs/promises'
import { createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { connect } from '@atoll/nbd-client'
import { afterEach, beforeEach, expect, test, vi } from 'vitest'
import { attach, pattern, slotBytes } from '../faults/broken-home.ts'
import { freePort } from '../free-port.ts'
import { TestHome } from '../test-home.ts'

let folder: string
let catalog: string

beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'atoll-shared-'))
  catalog = join(folder, 'catalog.db')
})

afterEach(async () => {
  await rm(folder, { recursive: true, force: true })
})

interface Status {
  readonly standby: { readonly catalog: string; readonly active: string } | null
}

test('a daemon stands by while another one is active, says so, and refuses everything else with its name', async () => {
  await using first = await TestHome.create()
  await using second = await TestHome.create()
  const { pid } = await first.start('--catalog', catalog)
  first.cli('volume', 'create', 'disk', '--size', '1M')
  const { http, nbdSocket } = await second.start('--catalog', catalog)
  expect(nbdSocket).toBeNull()
  expect(second.json<Status>('status').standby).toEqual({
    catalog,
    active: expect.stringMatching(new RegExp(`^pid ${pid} on .*, home ${first.path}, since`)) as string,
  })
  expect(second.cli('status')).toMatch(new RegExp(`status: +standby\\nactive: +pid ${pid} `))
  expect(await (await fetch(`${http}/healthz`)).json()).toEqual({ status: 'standby' })
  expect(await (await fetch(`${http}/metrics`)).text()).toContain('\natoll_active 0\n')
  for (const command of [
    ['volume', 'list'],
    ['volume', 'create', 'other', '--size', '1M'],
    ['pool', 'show', 'default'],
    ['file', 'list'],
    ['job', 'list'],
    ['check'],
    ['catalog', 'backup', join(folder, 'backup')],
    ['volume', 'attach', 'disk'],
  ]) {
    const refused = second.failure(...command)
    expect(refused.code, command.join(' ')).toBe('CATALOG_HELD')
    expect(refused.message).toContain(`pid ${pid}`)
  }
  expect(await second.end()).toBe(0)
  expect(first.json<{ name: string }[]>('volume', 'list')).toMatchObject([{ name: 'disk' }])
})

test('a home that has a catalog of its own does not stand by when that is held', async () => {
  await using first = await TestHome.create()
  await using second = await TestHome.create()
  await first.start('--catalog', join(second.path, 'catalog.db'))
  await expect(second.start()).rejects.toThrow('CATALOG_LOCKED')
})

test('who stands by takes the place of one that ended or was killed, by itself and before a command', async () => {
  await using first = await TestHome.create()
  await using second = await TestHome.create()
  await first.start('--catalog', catalog)
  first.cli('volume', 'create', 'disk', '--size', '1M')
  await second.start('--catalog', catalog)
  await first.end('SIGKILL')
  expect(second.json<{ name: string }[]>('volume', 'list')).toMatchObject([{ name: 'disk' }])
  const { http } = await first.start('--catalog', catalog)
  expect(first.json<Status>('status').standby).not.toBeNull()
  expect(await second.end()).toBe(0)
  // Nobody asks the admin socket of the other: it looks.
  await vi.waitFor(async () => expect(await (await fetch(`${http}/healthz`)).json()).toEqual({ status: 'ok' }), {
    timeout: 300_000,
    interval: 100,
  })
})

test('who could not listen leaves the catalog to others, says why once, and takes it when he can', async () => {
  await using first = await TestHome.create()
  await using second = await TestHome.create()
  const port = await freePort()
  const somebody = createServer().listen(port, '127.0.0.1')
  await once(somebody, 'listening')
  try {
    await first.start('--catalog', catalog)
    const { http } = await second.start('--catalog', catalog, '--nbd', `127.0.0.1:${port}`, '--nbd-insecure')
    await first.end('SIGKILL')
    const complaint = 'this daemon cannot take the place of the one that is gone'
    await vi.waitFor(async () => expect(await second.log()).toContain(complaint), { timeout: 300_000, interval: 100 })
    const refused = second.failure('volume', 'list')
    expect(refused.code).toBe('ADDRESS_IN_USE')
    // Nobody has the catalog meanwhile.
    await first.start('--catalog', catalog)
    expect(first.json<Status>('status').standby).toBeNull()
    await first.end()
    expect((await second.log()).split(complaint)).toHaveLength(2)
    somebody.close()
    await once(somebody, 'close')
    await vi.waitFor(async () => expect(await (await fetch(`${http}/healthz`)).json()).toEqual({ status: 'ok' }), {
      timeout: 300_000,
      interval: 100,
    })
  } finally {
    somebody.close()
  }
})

test('what a home has attached is served there only, and again when its daemon is active again', async () => {
  await using first = await TestHome.create()
  await using second = await TestHome.create()
  await first.start('--catalog', catalog)
  for (const name of ['kept', 'moved', 'let-go']) first.cli('volume', 'create', name, '--size', '1M')
  const [kept, moved, letGo] = ['kept', 'moved', 'let-go'].map((name) => first.cli('volume', 'attach', name, '--format', 'uri'))
  await second.start('--catalog', catalog)
  await first.end('SIGKILL')
  expect(second.json<{ attachments: unknown[] }>('volume', 'show', 'kept').attachments).toEqual([])
  expect(second.fail('volume', 'delete', 'kept')).toBe('VOLUME_IN_USE')
  second.cli('volume', 'detach', 'let-go')
  {
    await using client = await connect(second.cli('volume', 'attach', 'moved', '--format', 'uri'))
    await client.write(0, pattern(1, slotBytes))
    await client.flush()
  }
  second.cli('volume', 'detach', 'moved')
  await second.end()
  await first.start('--catalog', catalog)
  await (await connect(kept ?? '')).disconnect()
  await expect(connect(moved ?? '')).rejects.toThrow()
  await expect(connect(letGo ?? '')).rejects.toThrow()
  await using client = await attach(first, 'moved')
  expect(await client.read(0, slotBytes)).toEqual(pattern(1, slotBytes))
})

/** A daemon is killed that has flushed slot 0 of `disk` and only answered the seven behind it. */
async function startAndKill(home: TestHome): Promise<void> {
  await home.start('--catalog', catalog)
  home.cli('volume', 'create', 'disk', '--size', '1M')
  // From here on a write changes owners, which stand in the batch log alone until they are flushed.
  home.cli('snapshot', 'create', 'disk@before')
  const client = await connect(home.cli('volume', 'attach', 'disk', '--format', 'uri'))
  await client.write(0, pattern(1, slotBytes))
  await client.flush()
  for (let slot = 1; slot < 8; slot += 1) await client.write(slot * slotBytes, pattern(slot + 1, slotBytes))
  await home.end('SIGKILL')
}

test('what was answered and not flushed before a kill does not come back after another home had the volume', async () => {
  await using first = await TestHome.create()
  await using second = await TestHome.create()
  await startAndKill(first)
  await second.start('--catalog', catalog)
  const seen: Buffer[] = []
  {
    await using client = await attach(second, 'disk')
    expect(await client.read(0, slotBytes)).toEqual(pattern(1, slotBytes))
    for (let slot = 0; slot < 8; slot += 1) seen.push(Buffer.from(await client.read(slot * slotBytes, slotBytes)))
  }
  second.cli('volume', 'detach', 'disk')
  expect(await second.end()).toBe(0)
  await first.start('--catalog', catalog)
  await using client = await attach(first, 'disk')
  for (let slot = 0; slot < 8; slot += 1) expect(await client.read(slot * slotBytes, slotBytes)).toEqual(seen[slot])
})

test('what was answered and not flushed before a kill comes back if the other home did not have the volume', async () => {
  await using first = await TestHome.create()
  await using second = await TestHome.create()
  await startAndKill(first)
  await second.start('--catalog', catalog)
  second.cli('volume', 'create', 'other', '--size', '1M')
  second.cli('volume', 'delete', 'other')
  second.cli('pool', 'reclaim', 'default')
  expect(await second.end()).toBe(0)
  await first.start('--catalog', catalog)
  await using client = await attach(first, 'disk')
  for (let slot = 0; slot < 8; slot += 1)
    expect(await client.read(slot * slotBytes, slotBytes)).toEqual(pattern(slot + 1, slotBytes))
})
