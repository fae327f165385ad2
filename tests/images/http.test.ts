import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http'
import { createServer as createTlsServer } from 'node:https'
import type { AddressInfo } from 'node:net'
import { readFile, rm, writeFile } from 'node:fs/promises'
import { getCACertificates, setDefaultCACertificates } from 'node:tls'
import type { JobView } from '@atoll/composer'
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest'
import { hasPrograms } from '../cli/test-programs.ts'
import { ImageStand, mebibyte, nothingLeft, run } from './image-stand.ts'

type LookupAll = (host: string) => Promise<{ address: string; family: 4 | 6 }[]>
type Handler = (request: IncomingMessage, response: ServerResponse) => void

/** Serves one resource, with ranges. `breakAfterBytes`: the first so many answers are cut there. */
function resource(content: Buffer, options: { etag?: string; breakAfterBytes?: number; breaks?: number } = {}): Handler {
  let breaks = options.breaks ?? 0
  return (request, response) => {
    const { etag } = options
    const range = /^bytes=(\d+)-$/.exec(request.headers.range ?? '')
    const isRange = range !== null && etag !== undefined && request.headers['if-range'] === etag
    const startBytes = isRange ? Number(range[1]) : 0
    const part = content.subarray(startBytes)
    response.writeHead(isRange ? 206 : 200, {
      'content-length': part.length,
      ...(etag === undefined ? {} : { etag }),
      ...(isRange ? { 'content-range': `bytes ${startBytes}-${content.length - 1}/${content.length}` } : {}),
    })
    if (breaks > 0 && options.breakAfterBytes !== undefined) {
      breaks -= 1
      response.write(part.subarray(0, options.breakAfterBytes), () => response.destroy())
    } else response.end(part)
  }
}

describe('an image over HTTP', () => {
  let stand: ImageStand
  let server: Server
  let origin: string
  let handler: Handler
  let requests: IncomingMessage[]

  // The server is on loopback, so that is allowed here; what is not is tested with a resolver of its own.
  const fetchOptions = {
    allowPrivate: true,
    // Longer than any test: what has to stall stalls until the test goes on.
    headerTimeoutMs: 600_000,
    idleTimeoutMs: 600_000,
    retryDelayMs: 1,
    saveEveryBytes: mebibyte,
  }

  async function restand(imageFetch: object): Promise<void> {
    await stand.remove()
    stand = await ImageStand.open({ imageFetch })
  }

  beforeEach(async () => {
    requests = []
    handler = resource(Buffer.alloc(1))
    server = createServer((request, response) => {
      requests.push(request)
      handler(request, response)
    }).listen(0, '127.0.0.1')
    await once(server, 'listening')
    origin = `http://127.0.0.1:${(server.address() as AddressInfo).port}`
    stand = await ImageStand.open({ imageFetch: fetchOptions })
  })
  afterEach(async () => {
    await stand.remove()
    server.closeAllConnections()
    server.close()
  })

  async function fetched(url: string, format?: 'raw' | 'qcow2'): Promise<JobView> {
    const job = await stand.composer.images.importUrl({ name: 'image', url, ...(format === undefined ? {} : { format }) })
    return await stand.composer.jobs.wait(job.id)
  }
  async function refused(url: string, code: string, why = /./): Promise<void> {
    await expect(fetched(url)).resolves.toMatchObject({ state: 'failed', error: { code, message: expect.stringMatching(why) } })
    await expect(stand.left()).resolves.toEqual(nothingLeft)
  }
  /** Data, holes, and an end that is no whole block. */
  function rawContent(): Buffer {
    const content = Buffer.alloc(6 * mebibyte + 777)
    for (const offsetBytes of [0, 2 * mebibyte - 100, 5 * mebibyte, content.length - 500])
      randomBytes(500).copy(content, offsetBytes)
    return content
  }

  test('keeps bytes, size and holes when it is raw', async () => {
    const content = rawContent()
    handler = resource(content)
    await expect(fetched(`${origin}/disk.img`)).resolves.toMatchObject({
      state: 'done',
      progressBytes: content.length,
      totalBytes: content.length,
    })
    expect((await stand.exported('image')).equals(content)).toBe(true)
    expect((await stand.composer.pools.show('default')).storedBytes).toBeLessThan(mebibyte)
    expect(requests[0]?.headers['accept-encoding']).toBe('identity')
  })

  test('goes on where the connection broke, if the content is still the same', async () => {
    const content = rawContent()
    handler = resource(content, { etag: '"one"', breakAfterBytes: 2 * mebibyte + 5, breaks: 2 })
    await expect(fetched(`${origin}/disk.img`)).resolves.toMatchObject({ state: 'done' })
    expect((await stand.exported('image')).equals(content)).toBe(true)
    expect(requests.map(({ headers }) => headers.range)).toEqual([
      undefined,
      expect.stringMatching(/^bytes=2\d+-$/),
      expect.stringMatching(/^bytes=4\d+-$/),
    ])
    expect(requests[1]?.headers['if-range']).toBe('"one"')
  })

  test('begins anew when the content became another one, and nothing of the first shows', async () => {
    const first = Buffer.alloc(4 * mebibyte, 'first')
    const second = rawContent()
    const old = resource(first, { etag: '"one"', breakAfterBytes: 2 * mebibyte, breaks: 1 })
    const fresh = resource(second, { etag: '"two"' })
    handler = (request, response) => (requests.length === 1 ? old : fresh)(request, response)
    await expect(fetched(`${origin}/disk.img`)).resolves.toMatchObject({ state: 'done' })
    expect((await stand.exported('image')).equals(second)).toBe(true)
  })

  test('begins anew when the server cannot go on in the middle; a body that always ends early is refused', async () => {
    const content = rawContent()
    handler = resource(content, { breakAfterBytes: mebibyte, breaks: 1 })
    await expect(fetched(`${origin}/disk.img`)).resolves.toMatchObject({ state: 'done' })
    expect((await stand.exported('image')).equals(content)).toBe(true)
    await stand.composer.images.delete('image')
    handler = resource(content, { breakAfterBytes: mebibyte, breaks: 100 })
    await refused(`${origin}/disk.img`, 'IMAGE_FETCH_FAILED', /attempts/)
  })

  test('can be paused, and goes on after a restart of the daemon', async () => {
    const content = rawContent()
    const whole = resource(content, { etag: '"one"' })
    const stalled = Promise.withResolvers<void>()
    handler = (request, response) => {
      if (requests.length > 1) return whole(request, response)
      response.writeHead(200, { 'content-length': content.length, etag: '"one"' })
      response.write(content.subarray(0, 3 * mebibyte))
    }
    const job = await stand.composer.images.importUrl({ name: 'image', url: `${origin}/disk.img` })
    const waiting = stand.composer.jobs.wait(job.id, {
      onProgress: ({ progressBytes }) => void (progressBytes >= 2 * mebibyte && stalled.resolve()),
    })
    waiting.catch(() => undefined)
    await stalled.promise
    await stand.composer.jobs.pause(job.id)
    await stand.stop()
    await stand.start()
    await expect(stand.composer.jobs.show(job.id)).resolves.toMatchObject({ state: 'paused' })
    await stand.composer.jobs.resume(job.id)
    await expect(stand.composer.jobs.wait(job.id)).resolves.toMatchObject({ state: 'done' })
    expect((await stand.exported('image')).equals(content)).toBe(true)
    expect(requests[1]?.headers.range).toMatch(/^bytes=[23]\d+-$/)
  })

  test('that is cancelled leaves nothing', async () => {
    handler = (_request, response) => {
      response.writeHead(200, { 'content-length': 4 * mebibyte })
      response.write(Buffer.alloc(2 * mebibyte, 1))
    }
    const job = await stand.composer.images.importUrl({ name: 'image', url: `${origin}/disk.img` })
    await stand.composer.jobs.cancel(job.id)
    await expect(stand.left()).resolves.toEqual(nothingLeft)
  })

  test('is not fetched from an address that is not public unless that is allowed', async () => {
    await restand({ ...fetchOptions, allowPrivate: false })
    await refused(`${origin}/disk.img`, 'IMAGE_SOURCE_FORBIDDEN', /127\.0\.0\.1/)
    await refused('http://169.254.169.254/latest/meta-data/', 'IMAGE_SOURCE_FORBIDDEN')
    await refused('http://[::ffff:127.0.0.1]/', 'IMAGE_SOURCE_FORBIDDEN')
    await refused('http://localhost/', 'IMAGE_SOURCE_FORBIDDEN')
    expect(requests).toEqual([])
  })

  test('comes from the address that was checked: a name that resolves to another one later changes nothing', async () => {
    const answers = [['127.0.0.1'], ['10.0.0.1']]
    const lookup = vi.fn<LookupAll>(async () => (answers.shift() ?? []).map((address) => ({ address, family: 4 as const })))
    await restand({ ...fetchOptions, lookup })
    const content = rawContent()
    handler = resource(content)
    const url = origin.replace('127.0.0.1', 'images.example')
    await expect(fetched(`${url}/disk.img`)).resolves.toMatchObject({ state: 'done' })
    // Asked once for the one connection, and the connection asked nobody else.
    expect(lookup).toHaveBeenCalledTimes(1)
    expect(requests[0]?.headers.host).toMatch(/^images\.example:/)
    const rebinding = vi.fn<LookupAll>(async () => [
      { address: '8.8.8.8', family: 4 as const },
      { address: '127.0.0.1', family: 4 as const },
    ])
    await restand({ ...fetchOptions, allowPrivate: false, lookup: rebinding })
    await refused(`${url}/disk.img`, 'IMAGE_SOURCE_FORBIDDEN', /127\.0\.0\.1/)
  })

  test('follows redirects of its own origin, a few, and no others', async () => {
    const content = rawContent()
    const target = resource(content)
    handler = (request, response) => {
      const step = Number(/^\/step(\d+)$/.exec(request.url ?? '')?.[1] ?? 0)
      if (step === 0) return target(request, response)
      response.writeHead(302, { location: step === 1 ? '/disk.img' : `/step${step - 1}` }).end()
    }
    await expect(fetched(`${origin}/step3`)).resolves.toMatchObject({ state: 'done' })
    await stand.composer.images.delete('image')
    await refused(`${origin}/step9`, 'IMAGE_FETCH_FAILED', /redirects more than/)
    for (const location of [
      'http://169.254.169.254/',
      origin.replace('127.0.0.1', 'localhost'),
      origin.replace('http:', 'https:'),
      'file:///etc/passwd',
    ]) {
      handler = (_request, response) => void response.writeHead(301, { location }).end()
      await refused(`${origin}/disk.img`, 'IMAGE_SOURCE_FORBIDDEN', /redirects to/)
    }
  })

  test('is refused when the answer is an error, compressed, without a marked end, or larger than it says', async () => {
    handler = (_request, response) => void response.writeHead(404).end()
    await refused(`${origin}/disk.img`, 'IMAGE_FETCH_FAILED', /answered 404/)
    expect(requests).toHaveLength(1)
    handler = (_request, response) =>
      void response.writeHead(200, { 'content-encoding': 'gzip', 'content-length': 10 }).end('0123456789')
    await refused(`${origin}/disk.img`, 'IMAGE_FETCH_FAILED', /gzip/)
    handler = (_request, response) => {
      response.shouldKeepAlive = false
      response.useChunkedEncodingByDefault = false
      response.writeHead(200).end('something')
    }
    await refused(`${origin}/disk.img`, 'IMAGE_FETCH_FAILED', /marks no end/)
    handler = (_request, response) => void response.writeHead(200, { 'content-length': 0 }).end()
    await refused(`${origin}/disk.img`, 'SIZE_INVALID')
    handler = (_request, response) => void response.writeHead(200, { 'content-length': String(2 ** 50) }).write('x')
    await refused(`${origin}/disk.img`, 'SIZE_INVALID')
  })

  test('whose length is not known in advance is taken in chunks, and a cut one is refused', async () => {
    const content = rawContent()
    handler = (_request, response) => void response.writeHead(200).end(content)
    await expect(fetched(`${origin}/disk.img`)).resolves.toMatchObject({ state: 'done' })
    expect((await stand.exported('image')).equals(content)).toBe(true)
    await stand.composer.images.delete('image')
    handler = (_request, response) => void response.writeHead(200).write(content.subarray(0, mebibyte), () => response.destroy())
    await refused(`${origin}/disk.img`, 'IMAGE_FETCH_FAILED', /broke/)
  })

  test('of a server that says nothing, or trickles, is given up in time', async () => {
    await restand({ ...fetchOptions, headerTimeoutMs: 50 })
    handler = () => undefined
    await refused(`${origin}/disk.img`, 'IMAGE_FETCH_FAILED', /did not answer in 0\.05 s/)
    await restand({ ...fetchOptions, idleTimeoutMs: 50 })
    const timers: NodeJS.Timeout[] = []
    handler = (_request, response) => {
      response.writeHead(200, { 'content-length': mebibyte })
      timers.push(setInterval(() => response.write('x'), 5))
    }
    await refused(`${origin}/disk.img`, 'IMAGE_FETCH_FAILED', /sent less than/)
    for (const timer of timers) clearInterval(timer)
  })

  test('keeps user, password and query out of the catalog and of messages, and sends them', async () => {
    handler = (_request, response) => void response.writeHead(403).end()
    const url = `${origin.replace('//', '//user:secret-word@')}/disk.img?token=secret-token`
    const job = await fetched(url)
    expect(job).toMatchObject({ state: 'failed', params: { url: `${origin}/disk.img` } })
    expect(JSON.stringify(job)).not.toContain('secret')
    expect(requests[0]?.headers.authorization).toBe(`Basic ${Buffer.from('user:secret-word').toString('base64')}`)
    expect(requests[0]?.url).toBe('/disk.img?token=secret-token')
    handler = (_request, response) => void response.writeHead(200, { 'content-length': mebibyte }).write('x')
    const lost = await stand.composer.images.importUrl({ name: 'image', url })
    await stand.stop()
    expect((await readFile(stand.path('catalog.db'))).includes('secret')).toBe(false)
    await stand.start()
    await expect(stand.composer.jobs.wait(lost.id)).resolves.toMatchObject({
      state: 'failed',
      error: { code: 'IMAGE_STREAM_LOST' },
    })
    await expect(stand.left()).resolves.toEqual(nothingLeft)
  })

  test('is refused when its URL is none', async () => {
    for (const url of ['http://', 'ftp://host/x', 'nonsense']) {
      await expect(stand.composer.images.importUrl({ name: 'image', url })).rejects.toMatchObject({
        code: 'IMAGE_SOURCE_INVALID',
      })
    }
  })

  describe.skipIf(!hasPrograms('qemu-img', 'setpriv'))('that is qcow2 (package qemu-utils)', () => {
    let image: Buffer
    let raw: Buffer
    beforeEach(async () => {
      raw = Buffer.alloc(24 * mebibyte)
      randomBytes(5 * mebibyte).copy(raw, 9 * mebibyte)
      await writeFile(stand.path('raw'), raw)
      await run('qemu-img', ['convert', '-f', 'raw', '-O', 'qcow2', stand.path('raw'), stand.path('image')])
      image = await readFile(stand.path('image'))
    })

    test('is spooled over broken connections, converted, and the spool is gone', async () => {
      handler = resource(image, { etag: '"q"', breakAfterBytes: 2 * mebibyte + 1, breaks: 2 })
      await expect(fetched(`${origin}/disk`)).resolves.toMatchObject({ state: 'done', error: null })
      expect((await stand.exported('image')).equals(raw)).toBe(true)
      await stand.composer.images.delete('image')
      await expect(stand.left()).resolves.toEqual(nothingLeft)
    })

    test('is raw when that is asked for', async () => {
      handler = resource(image)
      await expect(fetched(`${origin}/disk`, 'raw')).resolves.toMatchObject({ state: 'done' })
      expect((await stand.exported('image')).equals(image)).toBe(true)
    })

    test('is refused when it is hostile, and leaves nothing', async () => {
      image.writeBigUInt64BE(4096n, 8)
      image.writeUInt32BE(11, 16)
      handler = resource(image)
      await refused(`${origin}/disk`, 'IMAGE_HAS_BACKING_FILE')
    })

    test('goes on after a restart in the middle of the transfer', async () => {
      const whole = resource(image, { etag: '"q"' })
      const stalled = Promise.withResolvers<void>()
      handler = (request, response) => {
        if (requests.length > 1) return whole(request, response)
        response.writeHead(200, { 'content-length': image.length, etag: '"q"' })
        response.write(image.subarray(0, 3 * mebibyte))
      }
      const job = await stand.composer.images.importUrl({ name: 'image', url: `${origin}/disk` })
      const waiting = stand.composer.jobs.wait(job.id, {
        onProgress: ({ progressBytes }) => void (progressBytes >= 2 * mebibyte && stalled.resolve()),
      })
      waiting.catch(() => undefined)
      await stalled.promise
      await stand.stop()
      await stand.start()
      await expect(stand.composer.jobs.wait(job.id)).resolves.toMatchObject({ state: 'done', error: null })
      expect((await stand.exported('image')).equals(raw)).toBe(true)
      expect(requests[1]?.headers.range).toMatch(/^bytes=[23]\d+-$/)
    })

    test('is fetched anew by a daemon with another home, which has nothing of what had arrived', async () => {
      const whole = resource(image, { etag: '"q"' })
      const stalled = Promise.withResolvers<void>()
      handler = (request, response) => {
        if (requests.length > 1) return whole(request, response)
        response.writeHead(200, { 'content-length': image.length, etag: '"q"' })
        response.write(image.subarray(0, 3 * mebibyte))
      }
      const job = await stand.composer.images.importUrl({ name: 'image', url: `${origin}/disk` })
      const waiting = stand.composer.jobs.wait(job.id, {
        onProgress: ({ progressBytes }) => void (progressBytes >= 2 * mebibyte && stalled.resolve()),
      })
      waiting.catch(() => undefined)
      await stalled.promise
      await stand.stop()
      await rm(stand.path('spool'), { recursive: true })
      await stand.start()
      await expect(stand.composer.jobs.wait(job.id)).resolves.toMatchObject({ state: 'done', error: null })
      expect((await stand.exported('image')).equals(raw)).toBe(true)
      expect(requests[1]?.headers.range).toBeUndefined()
    })
  })

  describe.skipIf(!hasPrograms('openssl'))('with TLS', () => {
    test('comes from a server that a trusted authority vouches for, and from no other', async () => {
      const [keyPath, certPath] = [stand.path('key.pem'), stand.path('cert.pem')]
      const subject = ['-subj', '/CN=127.0.0.1', '-addext', 'subjectAltName=IP:127.0.0.1']
      const key = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes', '-keyout', keyPath]
      await run('openssl', ['req', '-x509', '-days', '1', ...key, ...subject, '-out', certPath])
      const content = rawContent()
      const certificate = await readFile(certPath, 'utf8')
      const serve = resource(content)
      const secure = createTlsServer({ key: await readFile(keyPath), cert: certificate }, serve).listen(0, '127.0.0.1')
      await once(secure, 'listening')
      const url = `https://127.0.0.1:${(secure.address() as AddressInfo).port}/disk.img`
      const trusted = getCACertificates('default')
      try {
        await refused(url, 'IMAGE_FETCH_FAILED', /its certificate is refused/)
        // What NODE_EXTRA_CA_CERTS does at the start of a process.
        setDefaultCACertificates([...trusted, certificate])
        await expect(fetched(url)).resolves.toMatchObject({ state: 'done', error: null })
        expect((await stand.exported('image')).equals(content)).toBe(true)
      } finally {
        setDefaultCACertificates(trusted)
        secure.closeAllConnections()
        secure.close()
      }
    })
  })
})
