/**
 * Fuzzes the sockets of a real daemon: whole conversations, negotiation and requests in every form, put together from the corpus
 * and from random parts, then damaged; on the unix socket, and over TCP with TLS around them (tls-conversation.ts). Whatever comes,
 * the daemon must live, end every conversation whose client has ended it, serve others meanwhile, and keep its memory.
 */
import { readdir, readFile } from 'node:fs/promises'
import { createConnection, type NetConnectOpts } from 'node:net'
import { join } from 'node:path'
import { connect, encodeExtendedRequest, encodeRequest } from '@atoll/nbd-client'
import { TestAuthority } from '@atoll/nbd-client/testing'
import { holdsWithin } from '../holds-within.ts'
import { TestHome } from '../test-home.ts'
import { generator, type Random } from './random.ts'
import { brokenHandshake, converseTls, helloOf, type TlsTarget } from './tls-conversation.ts'

const MiB = 1024 * 1024
const diskBytes = 64 * MiB
/** A conversation that both sides have ended must be over after this. */
const hangLimitMs = 300_000
/** Conversations at a time. */
const workerCount = 4
/** Files that a daemon opens when it first needs them: layers, journals, a database's. */
const openFilesSlack = 16
/** What the daemon may grow by while it is fuzzed. */
export const grownBytesMax = 96 * MiB

export interface NbdFuzzReport {
  readonly seed: number
  readonly durationMs: number
  readonly conversations: number
  /** Of those, the ones that were answered with more than a negotiation's worth. */
  readonly answered: number
  /** Those over TCP. */
  readonly tlsConversations: number
  /** Of those, the ones whose handshake came to its end. */
  readonly tlsHandshakes: number
  /** Of those, the ones that were answered inside. */
  readonly tlsAnswered: number
  readonly sentBytes: number
  readonly receivedBytes: number
  readonly rssStartBytes: number
  readonly rssMaxBytes: number
  readonly rssEndBytes: number
  /** Open files of the daemon before and after. */
  readonly filesStart: number
  readonly filesEnd: number
}

/** Byte strings that have a meaning, one a line in hex behind its name; `$EXPORT` stands for the name of the export. */
interface Corpus {
  readonly openings: readonly Buffer[]
  readonly options: readonly Buffer[]
  readonly requests: readonly Buffer[]
  readonly records: readonly Buffer[]
}

async function readCorpus(exportName: string): Promise<Corpus> {
  const folder = join(import.meta.dirname, 'corpus')
  const found = new Map<string, Buffer[]>()
  for (const name of await readdir(folder)) {
    const lines = (await readFile(join(folder, name), 'utf8')).split('\n').filter((line) => line !== '' && !line.startsWith('#'))
    const bytesOf = (line: string): Buffer =>
      Buffer.concat(
        line
          .slice(line.indexOf(':') + 1)
          .trim()
          .split(/\s+/)
          .map((word) => (word === '$EXPORT' ? Buffer.from(exportName) : Buffer.from(word, 'hex'))),
      )
    found.set(name, lines.map(bytesOf))
  }
  const of = (name: string): Buffer[] => found.get(name) ?? []
  return { openings: of('openings.hex'), options: of('options.hex'), requests: of('requests.hex'), records: of('tls.hex') }
}

const lengths = [0, 1, 511, 512, 4095, 4096, 4097, MiB, diskBytes - 1, diskBytes, 2 ** 31, 2 ** 32 - 1, 2 ** 32, 2 ** 52]

function randomRequest(random: Random, isExtended: boolean): Buffer {
  const pick = (limit: number): number => (random(3) === 0 ? lengths[random(lengths.length)]! : random(limit))
  const command = random(10)
  const flags = random(3) === 0 ? random(2 ** 16) : random(64)
  const fields = { flags, command, cookie: BigInt(random(2 ** 32)), offsetBytes: pick(diskBytes), lengthBytes: pick(100_000) }
  const hasPayload = isExtended ? (flags & 32) !== 0 : command === 1
  const payload = Buffer.alloc(hasPayload && fields.lengthBytes < 200_000 ? fields.lengthBytes : 0, random(256))
  const header = isExtended
    ? encodeExtendedRequest(fields)
    : encodeRequest({ ...fields, lengthBytes: Math.min(fields.lengthBytes, 2 ** 32 - 1) })
  return Buffer.concat([header, payload])
}

function conversation(random: Random, corpus: Corpus): Buffer {
  const pick = (of: readonly Buffer[]): Buffer => of[random(of.length)]!
  const parts: Buffer[] = []
  const isExtended = random(2) === 0
  if (random(3) > 0) {
    // A good way in, so that requests are looked at.
    parts.push(corpus.openings[(isExtended ? 0 : 1) % corpus.openings.length]!)
  } else {
    const flags = Buffer.alloc(4)
    flags.writeUInt32BE(random(10) === 0 ? random(2 ** 32) : random(4), 0)
    parts.push(flags)
    for (let count = random(10); count > 0; count -= 1) parts.push(pick(random(6) === 0 ? corpus.requests : corpus.options))
  }
  for (let count = random(30); count > 0; count -= 1) {
    parts.push(random(2) === 0 ? pick(corpus.requests) : randomRequest(random, isExtended))
  }
  let stream = Buffer.concat(parts)
  if (random(2) === 0) {
    for (let count = 1 + random(5); count > 0 && stream.length > 8; count -= 1) {
      const at = random(stream.length)
      const kind = random(5)
      if (kind === 0) stream[at] = random(256)
      else if (kind === 1) stream = stream.subarray(0, at)
      else if (kind === 2)
        stream = Buffer.concat([stream.subarray(0, at), Buffer.alloc(1 + random(9), 0xff), stream.subarray(at)])
      else if (kind === 3) stream = Buffer.concat([stream, stream.subarray(at)])
      else stream.writeUInt32BE(lengths[random(lengths.length)]! >>> 0, Math.min(at, stream.length - 4))
    }
  }
  return stream.subarray(0, 4 * MiB)
}

/** One conversation: all is sent, in pieces, our end is finished, and the daemon must finish its own. Returns what came. */
function converse(address: NetConnectOpts, stream: Buffer, random: Random): Promise<number> {
  return new Promise((resolve, reject) => {
    const socket = createConnection(address)
    let receivedBytes = 0
    const leavesEarly = random(8) === 0
    const timer = setTimeout(() => {
      socket.destroy()
      reject(new Error(`no end after ${hangLimitMs} ms`))
    }, hangLimitMs)
    socket.on('data', (bytes: Buffer) => {
      receivedBytes += bytes.length
      if (leavesEarly && receivedBytes > 100) socket.destroy()
    })
    // The daemon may have closed under what we send.
    socket.on('error', () => {})
    socket.on('close', () => {
      clearTimeout(timer)
      resolve(receivedBytes)
    })
    for (let at = 0; at < stream.length;) {
      const lengthBytes = 1 + random(random(4) === 0 ? 50 : 100_000)
      socket.write(stream.subarray(at, at + lengthBytes))
      at += lengthBytes
    }
    socket.end()
  })
}

async function rssBytes(pid: number): Promise<number> {
  const status = await readFile(`/proc/${pid}/status`, 'utf8').catch(() => '')
  const [, kibibytes] = /^VmRSS:\s+(\d+) kB/m.exec(status) ?? []
  if (kibibytes === undefined) throw new Error(`the daemon, process ${pid}, is gone`)
  return Number(kibibytes) * 1024
}

/** Open files of a process. */
async function fileCount(pid: number): Promise<number> {
  return (await readdir(`/proc/${pid}/fd`)).length
}

/** A home with certificates in its folder `tls`, and what a client of its authority needs. */
async function makeCertificates(home: TestHome): Promise<{ directory: string; client: TlsTarget['client'] }> {
  const directory = join(home.path, 'tls')
  const authority = await TestAuthority.create(directory)
  await authority.issue(directory, { commonName: 'localhost' })
  await authority.issue(directory, { commonName: 'a fuzzer', usage: 'client' })
  const read = (name: string): Promise<Buffer> => readFile(join(directory, name))
  const files = { ca: await read('ca-cert.pem'), cert: await read('client-cert.pem'), key: await read('client-key.pem') }
  return { directory, client: { ...files, servername: 'localhost' } }
}

/** Whether enough has been tried to say something, however slow the machine is. */
function isWorthIt({
  conversations,
  answered,
  tlsAnswered,
}: Pick<NbdFuzzReport, 'conversations' | 'answered' | 'tlsAnswered'>): boolean {
  return conversations > 10 && answered > 0 && tlsAnswered > 0
}

/** Fuzzes for `durationMs`, or until enough is tried. A conversation's seed is in the error that it causes; `seed` replays the run, but for its timing. */
export async function fuzzNbd(options: {
  seed: number
  durationMs: number
  onProgress?: (text: string) => void
}): Promise<NbdFuzzReport> {
  const { seed, durationMs, onProgress } = options
  await using home = await TestHome.create()
  const { directory, client } = await makeCertificates(home)
  const { pid, nbdSocket, nbd } = await home.start('--nbd', '127.0.0.1:0', '--nbd-tls', directory)
  if (nbdSocket === null || nbd === null) throw new Error('the daemon does not listen')
  home.cli('volume', 'create', 'disk', '--size', String(diskBytes))
  home.cli('volume', 'create', 'steady', '--size', String(MiB))
  const uri = home.cli('volume', 'attach', 'disk', '--format', 'uri')
  home.cli('snapshot', 'create', 'disk@snap')
  const corpus = await readCorpus(new URL(uri).pathname.slice(1))
  const limitedTo12 = { ...client, maxVersion: 'TLSv1.2' } as const
  const hellos = [await helloOf(client), await helloOf(limitedTo12), await helloOf({ ...client, ALPNProtocols: ['nbd'] })]
  const target: TlsTarget = { port: Number(new URL(nbd).port), client, records: corpus.records, hellos }
  await using steady = await connect(home.cli('volume', 'attach', 'steady', '--format', 'uri'))
  await steady.write(0, Buffer.from('steady'))

  const rssStartBytes = await rssBytes(pid)
  const filesStart = await fileCount(pid)
  const startedAt = performance.now()
  const report = {
    conversations: 0,
    answered: 0,
    tlsConversations: 0,
    tlsHandshakes: 0,
    tlsAnswered: 0,
    sentBytes: 0,
    receivedBytes: 0,
    rssMaxBytes: rssStartBytes,
  }
  const overTls = async (random: Random): Promise<{ stream: Buffer; receivedBytes: number }> => {
    report.tlsConversations += 1
    const kind = random(10)
    if (kind < 4) {
      // In the clear where TLS is wanted, or what is no handshake.
      const stream = kind === 0 ? conversation(random, corpus) : brokenHandshake(random, target)
      return { stream, receivedBytes: await converse({ port: target.port, host: '127.0.0.1' }, stream, random) }
    }
    // The client flags came before STARTTLS.
    const stream = conversation(random, corpus).subarray(random(10) === 0 ? 0 : 4)
    const { receivedBytes, isSecure, isSound } = await converseTls(target, stream, random, hangLimitMs)
    if (isSound && !isSecure) throw new Error('a handshake without a fault was refused')
    if (isSecure) report.tlsHandshakes += 1
    if (receivedBytes > 200) report.tlsAnswered += 1
    return { stream, receivedBytes }
  }
  const inTheClear = async (random: Random): Promise<{ stream: Buffer; receivedBytes: number }> => {
    const stream = conversation(random, corpus)
    return { stream, receivedBytes: await converse({ path: nbdSocket }, stream, random) }
  }
  let nextReportAt = startedAt + 30_000
  const worker = async (workerIndex: number): Promise<void> => {
    for (let round = 0; performance.now() - startedAt < durationMs || !isWorthIt(report); round += 1) {
      const conversationSeed = (seed + workerIndex * 0x1000003 + round * 0x9e3779b1) >>> 0
      const random = generator(conversationSeed)
      const { stream, receivedBytes } = await (random(3) === 0 ? overTls(random) : inTheClear(random)).catch((cause: unknown) => {
        throw new Error(`the conversation of seed ${conversationSeed} failed`, { cause })
      })
      report.conversations += 1
      report.sentBytes += stream.length
      report.receivedBytes += receivedBytes
      if (receivedBytes > 200) report.answered += 1
      if (round % 25 === 0) {
        report.rssMaxBytes = Math.max(report.rssMaxBytes, await rssBytes(pid))
        const text = Buffer.from(await steady.read(0, 6)).toString()
        if (text !== 'steady') throw new Error(`another client read ${text} near seed ${conversationSeed}`)
      }
      if (performance.now() > nextReportAt) {
        nextReportAt += 30_000
        const seconds = Math.round((performance.now() - startedAt) / 1000)
        onProgress?.(
          `${seconds} s: ${report.conversations} conversations, ${report.tlsConversations} of them over TCP, RSS at most ${Math.round(report.rssMaxBytes / MiB)} MiB`,
        )
      }
    }
  }
  await Promise.all(Array.from({ length: workerCount }, (_, index) => worker(index)))
  const rssEndBytes = await rssBytes(pid)
  const filesEnd = await untilFewFiles(pid, filesStart + openFilesSlack)
  // What was fuzzed is still a disk.
  await using after = await connect(uri, { extendedHeaders: true, metaContexts: ['base:allocation', 'qemu:dirty-bitmap:snap'] })
  await after.write(0, Buffer.alloc(4096, 7), { fua: true })
  if ((await after.blockStatus(0, diskBytes)).size !== 2) throw new Error('the status of the disk has changed its form')
  if (report.rssMaxBytes - rssStartBytes > grownBytesMax) {
    throw new Error(`the daemon grew from ${rssStartBytes} to ${report.rssMaxBytes} bytes (seed ${seed})`)
  }
  const durationDoneMs = Math.round(performance.now() - startedAt)
  return { seed, durationMs: durationDoneMs, ...report, rssStartBytes, rssEndBytes, filesStart, filesEnd }
}

/** Waits until the sockets of ended conversations are closed; returns how many files are open then. */
async function untilFewFiles(pid: number, countMax: number): Promise<number> {
  let count = 0
  const few = await holdsWithin(hangLimitMs, async () => (count = await fileCount(pid)) <= countMax)
  if (!few) throw new Error(`the daemon has ${count} files open, at most ${countMax} are expected`)
  return count
}
