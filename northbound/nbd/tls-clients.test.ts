/** NBD over TLS with clients from packages: libnbd's tools and bindings, QEMU's tools. Both use GnuTLS, we do not. */
import { execFile } from 'node:child_process'
import { randomFillSync } from 'node:crypto'
import { readFile, writeFile } from 'node:fs/promises'
import { promisify } from 'node:util'
import { afterEach, beforeEach, expect, it } from 'vitest'
import {
  describeWithTools,
  nbdcopyTool,
  nbdinfoTool,
  opensslTool,
  pythonLibnbdTool,
  qemuImgTool,
  qemuIoTool,
  TestAuthority,
} from '@atoll/nbd-client/testing'
import { MiB } from './testing/nbd-fixture.ts'
import { TlsFixture, type RunningTlsServer } from './testing/tls-fixture.ts'

/** Output of a program that must succeed; its own words are in the error if it does not. */
async function run(command: string, ...parameters: string[]): Promise<string> {
  const { stdout } = await promisify(execFile)(command, parameters, { maxBuffer: 16 * MiB, timeout: 300_000 })
  return stdout
}

let fixture: TlsFixture
beforeEach(async () => {
  fixture = await TlsFixture.start({ sizeBytes: 64 * MiB })
})
afterEach(async () => {
  await fixture.close()
})

describeWithTools('libnbd', [opensslTool, nbdinfoTool, nbdcopyTool], () => {
  it('sees an export over TLS, and a name of the certificate is as good as its address', async () => {
    const server = await fixture.serve()
    const uri = server.uri(fixture.clientDirectory)
    for (const way of [uri, uri.replace('127.0.0.1', 'localhost')]) {
      expect(JSON.parse(await run('nbdinfo', '--json', way))).toMatchObject({
        protocol: 'newstyle-fixed',
        TLS: true,
        structured: true,
        exports: [{ 'export-name': 'disk', 'export-size': 64 * MiB, can_multi_conn: true }],
      })
    }
  })

  it('copies in and out over several connections and finds the same bytes', async () => {
    const server = await fixture.serve()
    const uri = server.uri(fixture.clientDirectory)
    const content = randomFillSync(Buffer.alloc(64 * MiB))
    await writeFile(fixture.plain.file('source'), content)
    await run('nbdcopy', '--connections=4', fixture.plain.file('source'), uri)
    await run('nbdcopy', '--connections=4', uri, fixture.plain.file('target'))
    expect((await readFile(fixture.plain.file('target'))).equals(content)).toBe(true)
  })

  it('is refused without a certificate or with one of another authority, and refuses a server that it does not trust', async () => {
    const server = await fixture.serve()
    const other = await TestAuthority.create(fixture.plain.file('other'), 'somebody else')
    const stranger = await other.issue(fixture.plain.file('stranger'), { commonName: 'guest-host', usage: 'client' })
    // The server is trusted, the client is not.
    const untrusted = fixture.plain.file('untrusted')
    await other.issue(untrusted, { commonName: 'guest-host', usage: 'client' })
    await writeFile(fixture.plain.file('untrusted/ca-cert.pem'), await readFile(fixture.authority.certificatePath))
    await run('nbdinfo', server.uri(fixture.clientDirectory))
    await expect.poll(() => fixture.plain.exports.count('disk')).toBe(0)
    // The folder of the authority has its certificate and none for a client.
    for (const directory of [stranger, untrusted, fixture.authority.directory]) {
      await expect(run('nbdinfo', server.uri(directory))).rejects.toMatchObject({ stderr: expect.stringMatching(/nbdinfo/) })
    }
    expect(fixture.plain.exports.count('disk')).toBe(0)
    const open = await fixture.serve({ verifyClients: false })
    await run('nbdinfo', open.uri(fixture.authority.directory))
  })

  it('that speaks in the clear is told that TLS is required', async () => {
    const { port } = await fixture.serve()
    const refused = run('nbdinfo', '--json', `nbd://127.0.0.1:${port}/disk`)
    await expect(refused).rejects.toMatchObject({ stderr: expect.stringContaining('nbdinfo') })
  })
})

describeWithTools('libnbd from Python', [opensslTool, pythonLibnbdTool], () => {
  it('keeps many requests in flight over one connection', async () => {
    const server = await fixture.serve()
    const script = `
import nbd, os, sys
h = nbd.NBD()
h.set_tls(nbd.TLS_REQUIRE)
h.set_tls_certificates(sys.argv[2])
h.set_export_name("disk")
h.connect_tcp("127.0.0.1", sys.argv[1])
size = 256 * 1024
data = [os.urandom(size) for _ in range(128)]

def finish(cookies):
    while cookies:
        h.poll(-1)
        cookies = [cookie for cookie in cookies if not h.aio_command_completed(cookie)]

writes = [h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(d)), i * size) for i, d in enumerate(data)]
finish(writes + [h.aio_flush() for _ in range(20)])
buffers = [nbd.Buffer(size) for _ in data]
reads = []
for i, b in enumerate(buffers):
    reads += [h.aio_pread(b, i * size), h.aio_flush()]
finish(reads)
assert all(bytes(b.to_bytearray()) == d for b, d in zip(buffers, data))
h.shutdown()
print("same")
`
    expect(await run('/usr/bin/python3', '-c', script, String(server.port), fixture.clientDirectory)).toBe('same\n')
  })
})

describeWithTools('QEMU', [opensslTool, qemuImgTool, qemuIoTool], () => {
  const blockdev = (server: RunningTlsServer): string[] => [
    '--object',
    `tls-creds-x509,id=tls0,endpoint=client,dir=${fixture.clientDirectory}`,
    '--image-opts',
    `driver=nbd,server.type=inet,server.host=127.0.0.1,server.port=${server.port},export=disk,tls-creds=tls0`,
  ]

  it('writes and reads over TLS', async () => {
    const server = await fixture.serve()
    const output = await run(
      'qemu-io',
      ...['write -P 7 1M 4M', 'flush', 'read -P 7 1M 4M', 'read -P 0 5M 1M'].flatMap((command) => ['-c', command]),
      ...blockdev(server),
    )
    expect(output).not.toContain('failed')
    expect(await run('qemu-img', 'info', ...blockdev(server))).toContain('64 MiB')
  })

  it('refuses a server whose certificate is for another name', async () => {
    const server = await fixture.serve()
    const named = blockdev(server).map((part) => (part.startsWith('driver=') ? `${part},tls-hostname=elsewhere.example` : part))
    await expect(run('qemu-img', 'info', ...named)).rejects.toMatchObject({
      stderr: expect.stringMatching(/hostname|certificate/i),
    })
  })
})
