// NBD over TCP as an operator sets it up: the real daemon, the real CLI, clients from packages.
import { execFile } from 'node:child_process'
import { chmod, copyFile, mkdir, readFile, rm, writeFile } from 'node:fs/promises'
import { hostname } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { expect, test } from 'vitest'
import { connect } from '@atoll/nbd-client'
import { TestAuthority } from '@atoll/nbd-client/testing'
import { freePort } from '../free-port.ts'
import { atollPath, repositoryRoot, runProgram, TestHome } from '../test-home.ts'
import { hasPrograms } from './test-programs.ts'

const canTls = hasPrograms('openssl', 'nbdinfo', 'qemu-io', 'qemu-img')

/** Output of a program that must succeed, while this process goes on. */
async function run(command: string, ...parameters: string[]): Promise<string> {
  return (await promisify(execFile)(command, parameters, { timeout: 300_000 })).stdout
}

/** A home with certificates of a server and a client in its folder `tls`. */
async function withCertificates(home: TestHome, days?: number): Promise<string> {
  const directory = join(home.path, 'tls')
  const authority = await TestAuthority.create(directory)
  await authority.issue(directory, { commonName: 'localhost', ...(days === undefined ? {} : { days }) })
  await authority.issue(directory, { commonName: 'a-host', usage: 'client' })
  return directory
}

interface Attached {
  readonly uri: string
  readonly exportName: string
  readonly socketPath: string | null
  readonly server: { host: string; port: number; tls: boolean } | null
}

test('without TLS a daemon listens on TCP only when it is told that this is wanted', async () => {
  await using home = await TestHome.create()
  const refused = runProgram(atollPath, ['serve', '--home', home.path, '--http', 'off', '--nbd', '127.0.0.1:0'])
  expect(refused).toMatchObject({ exitCode: 1, stderr: expect.stringMatching(/CONFIG_INVALID.*--nbd-tls DIR.*--nbd-insecure/) })

  const ready = await home.start('--nbd', '127.0.0.1:0', '--nbd-insecure')
  expect(ready.nbd).toMatch(/^nbd:\/\/127\.0\.0\.1:\d+$/)
  expect(home.json<{ nbd: string }>('status').nbd).toBe(ready.nbd)
  expect(await home.log()).toContain('in the clear')
  home.cli('volume', 'create', 'disk', '--size', '64M')
  // The unix socket is what attachments name while there is one.
  const { exportName, uri, server } = home.json<Attached>('volume', 'attach', 'disk')
  expect(uri).toMatch(/^nbd\+unix:/)
  expect(server).toBeNull()
  await using connection = await connect(`${ready.nbd}/${exportName}`)
  await connection.write(0, Buffer.from('over TCP'))
  expect(Buffer.from(await connection.read(0, 8)).toString()).toBe('over TCP')
})

test('where the unix socket is off, attachments name the TCP address, also after a restart on the same port', async () => {
  await using home = await TestHome.create()
  const port = await freePort()
  await writeFile(join(home.path, 'atoll.yaml'), `nbdSocket: off\nnbdInsecure: on\nnbd: 127.0.0.1:${port}\n`)
  const first = await home.start()
  expect(first.nbdSocket).toBeNull()
  home.cli('volume', 'create', 'disk', '--size', '64M')
  const attached = home.json<Attached>('volume', 'attach', 'disk')
  expect(attached).toMatchObject({
    uri: `${first.nbd}/${attached.exportName}`,
    socketPath: null,
    server: { host: '127.0.0.1', port, tls: false },
  })
  expect(home.cli('volume', 'attach', 'disk', '--format', 'uri')).toBe(attached.uri)
  expect(home.json<{ attachments: Attached[] }>('volume', 'show', 'disk').attachments[0]).toMatchObject({ uri: attached.uri })
  const { file } = JSON.parse(home.cli('volume', 'attach', 'disk', '--format', 'qemu'))
  expect(file.server).toEqual({ type: 'inet', host: '127.0.0.1', port: String(port) })
  expect(await home.end()).toBe(0)

  const second = await home.start()
  expect(second.nbd).toBe(first.nbd)
  await using connection = await connect(attached.uri)
  expect(connection.sizeBytes).toBe(64 * 1024 * 1024)
  expect(await home.end()).toBe(0)

  const wide = await home.start('--nbd', '0.0.0.0:0')
  const name = hostname()
  expect(wide.nbd).toMatch(/^nbd:\/\/0\.0\.0\.0:\d+$/)
  expect(home.cli('volume', 'attach', 'disk', '--format', 'uri')).toBe(
    `${wide.nbd}/${attached.exportName}`.replace('0.0.0.0', name),
  )
})

test.skipIf(!canTls)('a daemon with certificates serves QEMU and libnbd over TLS as the CLI says', async () => {
  await using home = await TestHome.create()
  const directory = await withCertificates(home)
  await writeFile(join(home.path, 'atoll.yaml'), 'nbdSocket: off\nnbd: 127.0.0.1:0\nnbdTls: tls\n')
  const ready = await home.start()
  expect(ready.nbd).toMatch(/^nbds:\/\/127\.0\.0\.1:\d+$/)
  home.cli('volume', 'create', 'disk', '--size', '64M')
  const uri = home.cli('volume', 'attach', 'disk', '--format', 'uri')
  expect(uri).toMatch(/^nbds:\/\/127\.0\.0\.1:\d+\/[-0-9a-f]{36}$/)
  expect(await run('nbdinfo', '--size', `${uri}?tls-certificates=${directory}`)).toBe(`${64 * 1024 * 1024}\n`)
  // Nothing is listed unless that is allowed, nobody comes in without a certificate, and nobody in the clear.
  const host = ready.nbd ?? ''
  await expect(run('nbdinfo', '--list', `${host}/?tls-certificates=${directory}`)).rejects.toThrow(/list/)
  await expect(run('nbdinfo', uri)).rejects.toThrow(/.+/)
  await expect(run('nbdinfo', uri.replace('nbds:', 'nbd:'))).rejects.toThrow(/.+/)

  const qemu = home.run('volume', 'attach', 'disk', '--format', 'qemu')
  const [, object = ''] = /-object (\S+)/.exec(qemu.stderr) ?? []
  const output = await run(
    'qemu-io',
    '--object',
    object.replace('DIR', directory),
    '-c',
    'write -P 5 1M 1M',
    '-c',
    'flush',
    '-c',
    'read -P 5 1M 1M',
    `json:${qemu.stdout.trim()}`,
  )
  expect(output).toContain('read 1048576/1048576 bytes')
  expect(output).not.toContain('failed')
  // The key is nobody's business.
  const key = await readFile(join(directory, 'server-key.pem'), 'utf8')
  expect(await home.log()).not.toContain(key.split('\n')[1])
})

test.skipIf(!canTls)('certificates are read again at SIGHUP, and bad ones leave the old in use', async () => {
  await using home = await TestHome.create()
  const directory = await withCertificates(home)
  const { nbd, pid } = await home.start('--nbd', 'localhost:0', '--nbd-tls', directory, '--nbd-list', '--nbd-tls-verify', 'off')
  expect(nbd).toMatch(/^nbds:\/\/localhost:\d+$/)
  const uri = `${nbd}/?tls-certificates=${join(home.path, 'tls')}`
  await run('nbdinfo', '--list', uri)
  const hangUp = async (message: string): Promise<void> => {
    process.kill(pid, 'SIGHUP')
    await expect.poll(() => home.log()).toContain(message)
  }
  const certificate = await readFile(join(directory, 'server-cert.pem'), 'utf8')
  await writeFile(join(directory, 'server-cert.pem'), 'no certificate')
  await hangUp('the old ones stay in use')
  await run('nbdinfo', '--list', uri)

  // Another authority: who trusts the old one refuses the server from now on.
  await writeFile(join(directory, 'server-cert.pem'), certificate)
  const before = join(home.path, 'before')
  await mkdir(before)
  await copyFile(join(directory, 'ca-cert.pem'), join(before, 'ca-cert.pem'))
  const trusting = `${nbd}/?tls-certificates=${before}`
  await run('nbdinfo', '--list', trusting)
  const other = await TestAuthority.create(join(home.path, 'other'))
  await other.issue(directory, { commonName: 'localhost' })
  await hangUp('the certificates were read again')
  await run('nbdinfo', '--list', uri)
  await expect(run('nbdinfo', '--list', trusting)).rejects.toThrow(/.+/)
  expect(home.json<{ ready: boolean }>('status').ready).toBe(true)
})

test.skipIf(!canTls)('what is wrong with certificates is said at the start', async () => {
  await using home = await TestHome.create()
  const directory = await withCertificates(home, -1)
  await chmod(join(directory, 'server-key.pem'), 0o644)
  await home.start('--nbd', ':0', '--nbd-tls', directory)
  const log = await home.log()
  expect(log).toContain('a certificate has expired')
  expect(log).toContain('a certificate expires soon')
  expect(log).toContain('every user of this machine can read the private key')
  expect(await home.end()).toBe(0)

  await rm(join(directory, 'server-key.pem'))
  const refused = runProgram(atollPath, ['serve', '--home', home.path, '--http', 'off', '--nbd', ':0', '--nbd-tls', directory])
  expect(refused.exitCode).toBe(1)
  expect(refused.stderr).toContain(`TLS_CREDENTIALS_INVALID: ${join(directory, 'server-key.pem')} cannot be read`)
})

test.skipIf(!canTls)('the commands of the README for NBD over TCP, pasted into a shell, serve a volume over TLS', async () => {
  const readme = await readFile(join(repositoryRoot, 'README.md'), 'utf8')
  const commands = [...readme.matchAll(/^```sh tls\n([^]*?)^```$/gm)].map((match) => match[1] ?? '').join('')
  expect(commands).toContain('--nbd-tls')
  const script = `set -euo pipefail\ntrap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n${commands}echo it is over\n`
  const pasted = runProgram('bash', ['-c', script], { cwd: repositoryRoot })
  expect(pasted.exitCode, `${pasted.stdout}\n${pasted.stderr}`).toBe(0)
  expect(pasted.stdout).toContain('export-size: 1073741824')
  expect(pasted.stdout).toMatch(/it is over\n$/)
})
