/** NBD over TCP with TLS: the rules of STARTTLS over real sockets, and who is let in. Clients from packages: tls-clients.test.ts. */
import { execFileSync } from 'node:child_process'
import { once } from 'node:events'
import { copyFile, readFile, rename, rm, writeFile } from 'node:fs/promises'
import { createConnection } from 'node:net'
import { join } from 'node:path'
import { afterEach, beforeEach, expect, it } from 'vitest'
import {
  connect,
  connectRaw,
  encodeInfoRequest,
  encodeMetaContextRequest,
  encodeOption,
  encodeRequest,
  protocol,
} from '@atoll/nbd-client'
import { describeWithTools, opensslTool, TestAuthority } from '@atoll/nbd-client/testing'
import { KiB, MiB } from './testing/nbd-fixture.ts'
import { startTlsOption, TlsFixture, upgrade } from './testing/tls-fixture.ts'

const { option, optionReply, command, infoItem, transmissionFlag } = protocol

let fixture: TlsFixture
beforeEach(async () => {
  fixture = await TlsFixture.start()
})
afterEach(async () => {
  await fixture.close()
})

const tlsRequired = 0x80000005

describeWithTools('a server without TLS', [opensslTool], () => {
  it('says that it has none, and never that it is required', async () => {
    await using client = await connectRaw(fixture.plain.target)
    await client.greet()
    for (const data of ['', 'data']) {
      expect((await client.ask(option.startTls, data)).map(({ type }) => type)).toEqual([optionReply.errorUnsupported])
    }
    await client.go('disk')
  })
})

describeWithTools('a server that requires TLS', [opensslTool], () => {
  it('answers every option but ABORT and STARTTLS with TLS_REQD, stays in step, and tells nothing', async () => {
    const server = await fixture.serve({ listing: true })
    await using client = await connectRaw(server.target)
    await client.greet()
    const asked: [number, Uint8Array][] = [
      [option.list, Buffer.alloc(0)],
      [option.list, Buffer.from('data')],
      [option.info, encodeInfoRequest('disk', [infoItem.blockSize])],
      [option.go, encodeInfoRequest('disk', [])],
      [option.go, encodeInfoRequest('no such disk', [])],
      [option.structuredReply, Buffer.alloc(0)],
      [option.setMetaContext, encodeMetaContextRequest('disk', ['base:allocation'])],
      [option.extendedHeaders, Buffer.alloc(0)],
      [99, Buffer.alloc(5000)],
      [option.go, Buffer.alloc(100 * KiB)],
    ]
    for (const [number, data] of asked) {
      const replies = await client.ask(number, data)
      expect(replies.map(({ type }) => type)).toEqual([tlsRequired])
      expect(replies[0]!.data.toString()).not.toContain('disk')
    }
    expect((await client.ask(option.startTls, 'data')).map(({ type }) => type)).toEqual([optionReply.errorInvalid])
    expect((await client.ask(option.abort, Buffer.alloc(100 * KiB))).map(({ type }) => type)).toEqual([optionReply.ack])
    await client.receiveEnd()
  })

  it('closes at EXPORT_NAME, which has no other refusal', async () => {
    const server = await fixture.serve()
    await using client = await connectRaw(server.target)
    await client.greet()
    client.sendOption(option.exportName, 'disk')
    await client.receiveEnd()
    expect(fixture.plain.exports.count('disk')).toBe(0)
  })

  it('serves over TLS 1.3 and 1.2, and shakes no hand below', async () => {
    const server = await fixture.serve()
    for (const version of ['TLSv1.3', 'TLSv1.2'] as const) {
      const limits = { minVersion: version, maxVersion: version }
      const secure = await upgrade(await startTlsOption(server.port), await fixture.clientOptions(limits))
      expect(secure.getProtocol()).toBe(version)
      secure.destroy()
      await using client = await fixture.connect(server, limits)
      await client.go('disk')
      client.sendRequest({ flags: 0, command: command.read, cookie: 7n, offsetBytes: 0, lengthBytes: 512 })
      expect(await client.receiveReplyHeader()).toEqual({ kind: 'simple', errno: 0, cookie: 7n })
      expect(await client.receive(512)).toEqual(Buffer.alloc(512))
    }
    const old = { minVersion: 'TLSv1', maxVersion: 'TLSv1.1', ciphers: 'ALL:@SECLEVEL=0' } as const
    await expect(upgrade(await startTlsOption(server.port), await fixture.clientOptions(old))).rejects.toThrow(
      /alert|version|closed/,
    )
  })

  it('lists nothing over TLS unless that is allowed', async () => {
    const silent = await fixture.serve({ listing: false })
    await using first = await fixture.connect(silent)
    expect((await first.ask(option.list)).map(({ type }) => type)).toEqual([optionReply.errorPolicy])
    const open = await fixture.serve({ listing: true })
    await using second = await fixture.connect(open)
    expect((await second.ask(option.list)).map(({ type }) => type)).toEqual([optionReply.server, optionReply.ack])
  })

  it('names its clients by their certificates', async () => {
    const server = await fixture.serve()
    await using client = await fixture.connect(server)
    await client.go('disk')
    expect(server.server.connections()).toEqual([
      { peer: expect.stringMatching(/^127\.0\.0\.1:\d+ \(guest-host\)$/), exportId: 'disk' },
    ])
  })

  it('serves over IPv6', async () => {
    const server = await fixture.serve({ host: '::1' })
    await using client = await fixture.connect(server)
    await client.go('disk')
    expect(server.server.connections()[0]!.peer).toMatch(/^\[::1\]:\d+ \(guest-host\)$/)
  })
})

describeWithTools('STARTTLS', [opensslTool], () => {
  it('forgets what was negotiated in the clear', async () => {
    const server = await fixture.serve({ mode: 'optional' })
    const socket = createConnection(server.target)
    const answers = (async (): Promise<Buffer> => {
      const chunks: Buffer[] = []
      for await (const chunk of socket.iterator({ destroyOnReturn: false })) {
        chunks.push(chunk as Buffer)
        // The greeting, two acknowledgements, a context with its acknowledgement.
        if (Buffer.concat(chunks).length >= 18 + 20 + 39 + 20 + 20) break
      }
      return Buffer.concat(chunks)
    })()
    socket.write(Buffer.from([0, 0, 0, 3]))
    socket.write(encodeOption(option.structuredReply, Buffer.alloc(0)))
    socket.write(encodeOption(option.setMetaContext, encodeMetaContextRequest('disk', ['base:allocation'])))
    socket.write(encodeOption(option.startTls, Buffer.alloc(0)))
    await answers
    const secure = await upgrade(socket, await fixture.clientOptions())
    secure.write(encodeOption(option.setMetaContext, encodeMetaContextRequest('disk', ['base:allocation'])))
    secure.write(encodeOption(option.go, encodeInfoRequest('disk', [])))
    const received: Buffer[] = []
    while (Buffer.concat(received).length < 20 + 1) received.push((await once(secure, 'data'))[0] as Buffer)
    const refusal = Buffer.concat(received)
    expect(refusal.readUInt32BE(12)).toBe(optionReply.errorInvalid)
    const infoAt = 20 + refusal.readUInt32BE(16)
    while (Buffer.concat(received).length < infoAt + 20 + 12) received.push((await once(secure, 'data'))[0] as Buffer)
    const info = Buffer.concat(received).subarray(infoAt)
    expect(info.readUInt32BE(12)).toBe(optionReply.info)
    expect(info.readUInt16BE(20 + 10) & transmissionFlag.df).toBe(0)
    secure.destroy()
  })

  it('is invalid a second time, and TLS_REQD is never said behind it', async () => {
    const server = await fixture.serve()
    await using client = await fixture.connect(server)
    for (const data of ['', 'data']) {
      expect((await client.ask(option.startTls, data)).map(({ type }) => type)).toEqual([optionReply.errorInvalid])
    }
    for (const number of [option.list, option.structuredReply, option.extendedHeaders, 99]) {
      expect((await client.ask(number)).map(({ type }) => type)).not.toContain(tlsRequired)
    }
    expect((await client.ask(option.go, encodeInfoRequest('no such disk', []))).at(-1)!.type).toBe(optionReply.errorUnknown)
    await client.go('disk')
  })

  it('may be left out where it is optional', async () => {
    const server = await fixture.serve({ mode: 'optional' })
    await using connection = await connect(server.target, { exportName: 'disk' })
    expect((await connection.read(0, 512)).length).toBe(512)
    await using client = await fixture.connect(server)
    await client.go('disk')
  })

  // CVE-2021-3716: nbdkit took options that an attacker had put behind STARTTLS in the clear as if they had come over TLS.
  it.each([
    ['nothing more', Buffer.alloc(0)],
    ['an option', encodeOption(option.structuredReply, Buffer.alloc(0))],
    ['the way into an export', encodeOption(option.go, encodeInfoRequest('disk', []))],
    ['one byte', Buffer.from([0x16])],
  ])('takes nothing that came in the clear behind it as protected: %s', async (what, injected) => {
    const server = await fixture.serve()
    const socket = createConnection(server.target)
    await once(socket, 'connect')
    // In one piece, so that the server has the injected bytes before it answers.
    socket.write(Buffer.concat([Buffer.from([0, 0, 0, 3]), encodeOption(option.startTls, Buffer.alloc(0)), injected]))
    let seen = Buffer.alloc(0)
    while (seen.length < 18 + 20) seen = Buffer.concat([seen, (await once(socket, 'data'))[0] as Buffer])
    expect(seen.readUInt32BE(18 + 12)).toBe(optionReply.ack)
    // The server may have closed before the client's hello is out, and Node says nothing about a handshake then.
    const closed = once(socket, 'close').then(() => Promise.reject(new Error('the server closed the connection')))
    closed.catch(() => {})
    const handshake = Promise.race([upgrade(socket, await fixture.clientOptions()), closed])
    if (what === 'nothing more') {
      ;(await handshake).destroy()
      return
    }
    await expect(handshake).rejects.toThrow(/.+/)
    await expect.poll(() => server.server.connections()).toEqual([])
    expect(fixture.plain.exports.count('disk')).toBe(0)
  })

  it('cuts a client off that stops in the middle of the handshake', async () => {
    const server = await fixture.serve({ limits: { handshakeTimeoutMs: 2000 } })
    // The beginning of a record that promises 512 bytes.
    for (const beginning of [Buffer.alloc(0), Buffer.from([0x16, 3, 1, 2, 0, 1, 0, 1])]) {
      const socket = await startTlsOption(server.port)
      socket.write(beginning)
      socket.resume()
      await once(socket, 'close')
    }
    await expect.poll(() => server.server.connections()).toEqual([])
  })

  it('ends with an alert when the client talks nonsense', async () => {
    const server = await fixture.serve()
    const socket = await startTlsOption(server.port)
    socket.write(Buffer.from('GET / HTTP/1.1\r\n\r\n'))
    const [answer] = (await once(socket, 'data')) as [Buffer]
    // Content type 21: an alert.
    expect(answer[0]).toBe(21)
    socket.resume()
    await once(socket, 'close')
  })
})

describeWithTools('who is let in', [opensslTool], () => {
  const enter = async (server: Awaited<ReturnType<TlsFixture['serve']>>, changes: object): Promise<void> => {
    await using client = await fixture.connect(server, changes)
    await client.go('disk')
  }

  it('a client of another authority, without a certificate, or with an expired one is refused', async () => {
    const server = await fixture.serve()
    const other = await TestAuthority.create(fixture.plain.file('other'), 'somebody else')
    await other.issue(fixture.plain.file('stranger'), { commonName: 'guest-host', usage: 'client' })
    await fixture.authority.issue(fixture.plain.file('late'), { commonName: 'late', usage: 'client', days: -1 })
    const of = async (folder: string): Promise<object> => ({
      cert: await readFile(fixture.plain.file(`${folder}/client-cert.pem`)),
      key: await readFile(fixture.plain.file(`${folder}/client-key.pem`)),
    })
    await enter(server, {})
    for (const changes of [await of('stranger'), await of('late'), { cert: undefined, key: undefined }]) {
      await expect(enter(server, changes)).rejects.toThrow(/.+/)
    }
    // A server's certificate is none for a client.
    const server2 = {
      cert: await readFile(join(fixture.serverDirectory, 'server-cert.pem')),
      key: await readFile(join(fixture.serverDirectory, 'server-key.pem')),
    }
    await expect(enter(server, server2)).rejects.toThrow(/.+/)
    expect(fixture.plain.exports.count('disk')).toBe(0)
  })

  it('everybody is let in where clients are not verified, and the authority is not needed then', async () => {
    await rm(join(fixture.serverDirectory, 'ca-cert.pem'))
    const server = await fixture.serve({ verifyClients: false })
    await enter(server, { cert: undefined, key: undefined })
  })

  it('a certificate on the list of revoked ones is refused', async () => {
    const directory = fixture.plain.file('with-list')
    await fixture.authority.issue(directory, { commonName: 'localhost' })
    await fixture.authority.revoke(join(directory, 'ca-crl.pem'))
    await enter(await fixture.serve({ directory }), {})
    await fixture.authority.revoke(join(directory, 'ca-crl.pem'), join(fixture.clientDirectory, 'client-cert.pem'))
    await expect(enter(await fixture.serve({ directory }), {})).rejects.toThrow(/.+/)
  })

  it('keys of RSA work too', async () => {
    const directory = fixture.plain.file('rsa')
    await fixture.authority.issue(directory, { commonName: 'localhost', key: 'rsa' })
    await enter(await fixture.serve({ directory }), {})
  })
})

describeWithTools('credentials', [opensslTool], () => {
  const load = (verifyClients = true): Promise<unknown> =>
    fixture.plain.engine.loadTls({ directory: fixture.serverDirectory, verifyClients })
  const path = (name: string): string => join(fixture.serverDirectory, name)

  it.each(['ca-cert.pem', 'server-cert.pem', 'server-key.pem'])('%s that is missing, empty or no PEM is named', async (name) => {
    for (const content of [null, '', 'not PEM\n', '-----BEGIN CERTIFICATE-----\n%%%\n-----END CERTIFICATE-----\n']) {
      if (content === null) await rm(path(name))
      else await writeFile(path(name), content)
      await expect(load()).rejects.toMatchObject({
        code: 'TLS_CREDENTIALS_INVALID',
        message: expect.stringContaining(path(name)),
        values: { path: path(name) },
      })
    }
  })

  it('a certificate where the key should be, and a key where the certificate should be, are named', async () => {
    await copyFile(path('server-cert.pem'), path('kept.pem'))
    await copyFile(path('server-key.pem'), path('server-cert.pem'))
    await expect(load()).rejects.toMatchObject({ message: `${path('server-cert.pem')} has no certificate in PEM form` })
    await copyFile(path('kept.pem'), path('server-cert.pem'))
    await copyFile(path('kept.pem'), path('server-key.pem'))
    await expect(load()).rejects.toMatchObject({
      message: expect.stringContaining(`${path('server-key.pem')} has no private key`),
    })
  })

  it('a key of another certificate is refused, and nothing of it is said', async () => {
    await fixture.authority.issue(fixture.plain.file('second'), { commonName: 'localhost' })
    await copyFile(fixture.plain.file('second/server-key.pem'), path('server-key.pem'))
    await expect(load()).rejects.toMatchObject({
      code: 'TLS_CREDENTIALS_INVALID',
      message: `${path('server-key.pem')} is not the key of ${path('server-cert.pem')}`,
    })
  })

  it('keys in the older forms of PEM are read as well', async () => {
    for (const key of ['rsa', 'ec'] as const) {
      await fixture.authority.issue(fixture.serverDirectory, { commonName: 'localhost', key })
      execFileSync('openssl', ['pkey', '-traditional', '-in', path('server-key.pem'), '-out', path('old-key.pem')])
      await rename(path('old-key.pem'), path('server-key.pem'))
      expect(await readFile(path('server-key.pem'), 'utf8')).toContain(`BEGIN ${key.toUpperCase()} PRIVATE KEY`)
      await load()
    }
  })

  it('a list of revoked certificates that cannot be read is no empty list', async () => {
    await writeFile(path('ca-crl.pem'), 'nothing\n')
    await expect(load()).rejects.toMatchObject({ message: expect.stringContaining(path('ca-crl.pem')) })
    await load(false)
  })
})

describeWithTools('a connection over TLS', [opensslTool], () => {
  it('answers everything it took before it ends, when the server is drained, and says goodbye', async () => {
    const server = await fixture.serve()
    await using client = await fixture.connect(server)
    await client.go('disk')
    const count = 400
    const requests = Array.from({ length: count }, (_, index) => {
      // Flushes are answered by other threads than reads.
      const isFlush = index % 5 === 0
      const [kind, lengthBytes] = isFlush ? [command.flush, 0] : [command.read, 20 * KiB]
      return encodeRequest({ flags: 0, command: kind, cookie: BigInt(index), offsetBytes: 0, lengthBytes })
    })
    // In one record, which is there as a whole when the first is answered: what came later would be met by a reset.
    client.send(Buffer.concat(requests))
    const firstAnswered = Promise.withResolvers<void>()
    const errnos = new Set<number>()
    let answered = 0
    const answers = async (): Promise<never> => {
      for (;;) {
        const reply = await client.receiveReplyHeader()
        if (reply.kind !== 'simple') throw new Error('a simple reply is wanted')
        if (reply.errno === 0 && reply.cookie % 5n !== 0n) await client.receive(20 * KiB)
        errnos.add(reply.errno)
        answered += 1
        firstAnswered.resolve()
      }
    }
    const ended = answers()
    ended.catch(firstAnswered.reject)
    await firstAnswered.promise
    const drained = server.server.drain()
    // The end comes between two replies and never inside one.
    await expect(ended).rejects.toMatchObject({ code: 'NBD_CONNECTION_LOST', message: 'the peer closed the connection' })
    for (const errno of errnos) expect([0, 108]).toContain(errno)
    await drained
    expect(answered).toBeLessThanOrEqual(count)
    expect(fixture.plain.exports.count('disk')).toBe(0)
  })

  it('keeps every byte in its place with large writes, large reads and flushes at once', async () => {
    const { device } = await fixture.plain.openDevice({ sizeBytes: 64 * MiB })
    fixture.plain.exports.add('big', device)
    const server = await fixture.serve()
    await using client = await fixture.connect(server)
    await client.go('big')
    const pieces = [1, 4096, 128 * KiB - 1, 128 * KiB + 1, 256 * KiB + 5, 5 * MiB + 3, 32 * MiB]
    for (const [index, lengthBytes] of pieces.entries()) {
      const data = Buffer.alloc(lengthBytes)
      for (let at = 0; at + 4 <= lengthBytes; at += 4) data.writeUInt32BE((at * 2654435761 + index) >>> 0, at)
      const request = { flags: 0, offsetBytes: index, lengthBytes }
      client.sendRequest({ ...request, command: command.write, cookie: 1n }, data)
      client.sendRequest({ flags: 0, command: command.flush, cookie: 2n, offsetBytes: 0, lengthBytes: 0 })
      const cookies = [await client.receiveReplyHeader(), await client.receiveReplyHeader()].map(({ cookie }) => cookie)
      expect(cookies.toSorted()).toEqual([1n, 2n])
      client.sendRequest({ ...request, command: command.read, cookie: 3n })
      client.sendRequest({ flags: 0, command: command.flush, cookie: 4n, offsetBytes: 0, lengthBytes: 0 })
      const found: boolean[] = []
      for (let replies = 0; replies < 2; replies += 1) {
        const { cookie } = await client.receiveReplyHeader()
        if (cookie === 3n) found.push((await client.receive(lengthBytes)).equals(data))
      }
      expect(found).toEqual([true])
    }
  })

  it('that is broken in the middle of a record ends, and the others go on', async () => {
    const server = await fixture.serve()
    await using other = await fixture.connect(server)
    await other.go('disk')
    const socket = await startTlsOption(server.port)
    const secure = await upgrade(socket, await fixture.clientOptions())
    secure.write(encodeOption(option.go, encodeInfoRequest('disk', [])))
    await expect.poll(() => fixture.plain.exports.count('disk')).toBe(2)
    secure.on('error', () => {})
    // Half of a large record's worth of data, and then nothing more of the connection below.
    secure.write(Buffer.alloc(16 * KiB, 0x25))
    socket.destroy()
    await expect.poll(() => fixture.plain.exports.count('disk')).toBe(1)
    other.sendRequest({ flags: 0, command: command.read, cookie: 9n, offsetBytes: 0, lengthBytes: 512 })
    expect(await other.receiveReplyHeader()).toEqual({ kind: 'simple', errno: 0, cookie: 9n })
  })
})
