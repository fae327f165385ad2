import { existsSync, statSync } from 'node:fs'
import { chmod, mkdir, stat, writeFile } from 'node:fs/promises'
import { createServer } from 'node:net'
import { once } from 'node:events'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { connect } from '@atoll/nbd-client'
import { freePort } from '../free-port.ts'
import { atollPath, repositoryRoot, runProgram, succeed, TestHome } from '../test-home.ts'

interface Status {
  readonly ready: boolean
  readonly pid: number
  readonly volumes: number
  readonly attachedVolumes: number
}

test('a first start makes the home, says where clients can come and answers on its sockets', async () => {
  await using home = await TestHome.create()
  const ready = await home.start()
  expect(ready).toEqual({
    ready: true,
    http: expect.stringMatching(/^http:\/\/127\.0\.0\.1:\d+$/),
    nbd: null,
    nbdSocket: join(home.path, 'nbd.sock'),
    iscsi: null,
    home: home.path,
    pid: expect.any(Number),
  })
  expect(statSync(home.path).mode & 0o777).toBe(0o700)
  expect(statSync(join(home.path, 'nbd.sock')).mode & 0o777).toBe(0o660)
  expect(statSync(join(home.path, 'admin.sock')).mode & 0o777).toBe(0o600)
  expect(existsSync(join(home.path, 'catalog.db'))).toBe(true)
  expect(existsSync(join(home.path, 'pools', 'default'))).toBe(true)

  const health = await fetch(`${ready.http}/healthz`)
  expect([health.status, await health.json()]).toEqual([200, { status: 'ok' }])
  expect((await fetch(`${ready.http}/elsewhere`)).status).toBe(404)

  const status = home.json<Status>('status')
  expect(status).toMatchObject({ ready: true, pid: ready.pid, volumes: 0, attachedVolumes: 0 })
  expect(home.json<{ name: string; driver: string }[]>('pool', 'list')).toMatchObject([{ name: 'default', driver: 'file' }])
})

test('SIGTERM and SIGINT end the daemon with 0, and what it served is gone', async () => {
  for (const signal of ['SIGTERM', 'SIGINT'] as const) {
    await using home = await TestHome.create()
    // A port that nobody is given by chance, when it is free again.
    const { http } = await home.start('--http', `127.0.0.1:${await freePort()}`)
    expect(await home.end(signal)).toBe(0)
    expect(home.fail('status')).toBe('DAEMON_NOT_RUNNING')
    await expect(fetch(`${http}/healthz`)).rejects.toThrow('fetch failed')
  }
})

test('a signal to the pid that the caller got reaches the daemon', async () => {
  await using home = await TestHome.create()
  const { pid } = await home.start()
  process.kill(pid, 'SIGTERM')
  expect(await home.ended()).toBe(0)
})

test('a second daemon on the same home is refused with the pid of the first, which goes on', async () => {
  await using home = await TestHome.create()
  const { pid } = await home.start()
  const second = runProgram(atollPath, ['serve', '--json', '--http', ':0', '--home', home.path])
  expect(second.exitCode).toBe(1)
  expect(second.stdout).toBe('')
  expect(second.stderr).toContain('HOME_LOCKED')
  expect(second.stderr).toContain(`pid ${pid}`)
  expect(home.json<Status>('status').pid).toBe(pid)
})

test('attachments, their URIs and their bytes survive kill -9', async () => {
  await using home = await TestHome.create()
  await home.start()
  home.cli('volume', 'create', 'disk', '--size', '1G')
  const uri = home.cli('volume', 'attach', 'disk', '--format', 'uri')
  const before = await connect(uri)
  await before.write(4096, new Uint8Array(8192).fill(7))
  await before.flush()

  expect(await home.end('SIGKILL')).toBe(null)
  expect(home.fail('status')).toBe('DAEMON_NOT_RUNNING')
  await home.start()

  expect(home.cli('volume', 'attach', 'disk', '--format', 'uri')).toBe(uri)
  const after = await connect(uri)
  expect(await after.read(0, 16_384)).toEqual(Buffer.concat([Buffer.alloc(4096), Buffer.alloc(8192, 7), Buffer.alloc(4096)]))
  await after.disconnect()
  expect(home.json<Status>('status')).toMatchObject({ volumes: 1, attachedVolumes: 1 })
})

test('sockets that a dead daemon left are replaced, other files in their place are not touched', async () => {
  await using home = await TestHome.create()
  await home.start()
  await home.end('SIGKILL')
  expect(existsSync(join(home.path, 'nbd.sock'))).toBe(true)
  await home.start()
  await home.end()

  await writeFile(join(home.path, 'nbd.sock'), 'precious')
  await expect(home.start()).rejects.toThrow('CONFIG_INVALID')
  expect((await stat(join(home.path, 'nbd.sock'))).size).toBe('precious'.length)
})

test('an HTTP port that is taken ends the start with the address in the message, and nothing runs on', async () => {
  await using home = await TestHome.create()
  const other = createServer().listen(0, '127.0.0.1')
  await once(other, 'listening')
  const { port } = other.address() as { port: number }
  const result = runProgram(atollPath, ['serve', '--http', `127.0.0.1:${port}`, '--home', home.path])
  other.close()
  expect(result.exitCode).toBe(1)
  expect(result.stderr).toContain(`LISTEN_FAILED`)
  expect(result.stderr).toContain(`127.0.0.1:${port}`)
  await home.start()
})

test('what the options and the configuration file say is checked before anything is made', async () => {
  await using home = await TestHome.create()
  const serve = (...args: string[]): ReturnType<typeof runProgram> =>
    runProgram(atollPath, ['serve', '--home', home.path, ...args])
  expect(serve('--http', 'nowhere').stderr).toContain('CONFIG_INVALID')
  expect(serve('--socket-group', 'no-such-group-here').stderr).toContain('no-such-group-here')
  expect(serve('--iscsi', ':3260')).toMatchObject({ exitCode: 2, stderr: expect.stringContaining('--iscsi') })
  expect(serve('--nbd', ':10809').stderr).toContain('--nbd-insecure')
  await writeFile(join(home.path, 'atoll.yaml'), 'htpp: 127.0.0.1:0\n')
  expect(serve('--http', ':0').stderr).toContain('htpp')
  expect(existsSync(join(home.path, 'catalog.db'))).toBe(false)
  const long = join(home.path, 'x'.repeat(100))
  expect(runProgram(atollPath, ['serve', '--http', ':0', '--home', long]).stderr).toContain('shorter --home')
})

test('what is switched off is null in the ready object', async () => {
  await using home = await TestHome.create()
  const ready = await home.start('--http', 'off', '--iscsi', 'off', '--nbd', 'off')
  expect(ready).toMatchObject({ http: null, nbd: null, iscsi: null, nbdSocket: join(home.path, 'nbd.sock') })
})

test('without --json the daemon prints one line that starts with ready', async () => {
  await using home = await TestHome.create()
  const output = runProgram('sh', [
    '-c',
    // Ends the daemon as soon as the first line is there.
    `"$1" serve --http off --home "$2" 2>/dev/null | { read -r line; echo "$line"; kill "\${line##*pid }"; cat; }`,
    'sh',
    atollPath,
    home.path,
  ])
  expect(output.stdout).toMatch(new RegExp(`^ready  .*${join(home.path, 'nbd.sock')}.*  pid \\d+\\n$`))
})

test('the launcher works from elsewhere, through a link, and says what to run when nothing is installed', async () => {
  await using home = await TestHome.create()
  const link = join(repositoryRoot, 'node_modules', '.bin', 'atoll')
  expect(succeed('the linked launcher', runProgram(link, ['--version'], { cwd: home.path }))).toMatch(/^\d+\.\d+\.\d+$/)

  const bare = join(home.path, 'clone')
  await mkdir(bare)
  succeed('cp', runProgram('cp', [atollPath, join(bare, 'atoll')]))
  await chmod(join(bare, 'atoll'), 0o755)
  expect(runProgram(join(bare, 'atoll'), ['status'])).toMatchObject({ exitCode: 1, stderr: expect.stringContaining('npm start') })
})
