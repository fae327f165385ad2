/**
 * Fuzzes the socket of a real daemon: whole conversations, negotiation and requests in every form, put together from the corpus
 * and from random parts, then damaged. Whatever comes, the daemon must live, end every conversation whose client has ended it,
 * serve others meanwhile, and keep its memory.
 */
import { readdir, readFile } from 'node:fs/promises'
import { createConnection } from 'node:net'
import { join } from 'node:path'
import { connect, encodeExtendedRequest, encodeRequest } from '@atoll/nbd-client'
import { TestHome } from '../test-home.ts'

const MiB = 1024 * 1024
const diskBytes = 64 * MiB
/** A conversation that both sides have ended must be over after this. */
const hangLimitMs = 20_000
/** Conversations at a time. */
const workerCount = 4
/** What the daemon may grow by while it is fuzzed. */
export const grownBytesMax = 512 * MiB

export interface NbdFuzzReport {
  readonly seed: number
  readonly durationMs: number
  readonly conversations: number
  /** Of those, the ones that were answered with more than a negotiation's worth. */
  readonly answered: number
  readonly sentBytes: number
  readonly receivedBytes: number
  readonly rssStartBytes: number
  readonly rssMaxBytes: number
  readonly rssEndBytes: number
}

/** mulberry32: small, and the same everywhere. */
function generator(start: number): Random {
  let state = start >>> 0
  return (below) => {
    state = (state + 0x6d2b79f5) >>> 0
    let mixed = Math.imul(state ^ (state >>> 15), state | 1)
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61)
    return Math.floor((((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32) * below)
  }
}

type Random = (below: number) => number

/** Byte strings that have a meaning, one a line in hex behind its name; `$EXPORT` stands for the name of the export. */
interface Corpus {
  readonly openings: readonly Buffer[]
  readonly options: readonly Buffer[]
  readonly requests: readonly Buffer[]
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
  return { openings: of('openings.hex'), options: of('options.hex'), requests: of('requests.hex') }
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
function converse(socketPath: string, stream: Buffer, random: Random): Promise<number> {
  return new Promise((resolve, reject) => {
    const socket = createConnection(socketPath)
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

/** Fuzzes for `durationMs`. A conversation's seed is in the error that it causes; `seed` replays the run, but for its timing. */
export async function fuzzNbd(options: {
  seed: number
  durationMs: number
  onProgress?: (text: string) => void
}): Promise<NbdFuzzReport> {
  const { seed, durationMs, onProgress } = options
  await using home = await TestHome.create()
  const { pid, nbdSocket } = await home.start()
  if (nbdSocket === null) throw new Error('the daemon has no NBD socket')
  home.cli('volume', 'create', 'disk', '--size', String(diskBytes))
  home.cli('volume', 'create', 'steady', '--size', String(MiB))
  const uri = home.cli('volume', 'attach', 'disk', '--format', 'uri')
  home.cli('snapshot', 'create', 'disk@snap')
  const corpus = await readCorpus(new URL(uri).pathname.slice(1))
  await using steady = await connect(home.cli('volume', 'attach', 'steady', '--format', 'uri'))
  await steady.write(0, Buffer.from('steady'))

  const rssStartBytes = await rssBytes(pid)
  const startedAt = performance.now()
  const report = { conversations: 0, answered: 0, sentBytes: 0, receivedBytes: 0, rssMaxBytes: rssStartBytes }
  let nextReportAt = startedAt + 30_000
  const worker = async (workerIndex: number): Promise<void> => {
    for (let round = 0; performance.now() - startedAt < durationMs; round += 1) {
      const conversationSeed = (seed + workerIndex * 0x1000003 + round * 0x9e3779b1) >>> 0
      const random = generator(conversationSeed)
      const stream = conversation(random, corpus)
      const receivedBytes = await converse(nbdSocket, stream, random).catch((cause: unknown) => {
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
          `${seconds} s: ${report.conversations} conversations, RSS at most ${Math.round(report.rssMaxBytes / MiB)} MiB`,
        )
      }
    }
  }
  await Promise.all(Array.from({ length: workerCount }, (_, index) => worker(index)))
  const rssEndBytes = await rssBytes(pid)
  // What was fuzzed is still a disk.
  await using after = await connect(uri, { extendedHeaders: true, metaContexts: ['base:allocation', 'qemu:dirty-bitmap:snap'] })
  await after.write(0, Buffer.alloc(4096, 7), { fua: true })
  if ((await after.blockStatus(0, diskBytes)).size !== 2) throw new Error('the status of the disk has changed its form')
  if (report.rssMaxBytes - rssStartBytes > grownBytesMax) {
    throw new Error(`the daemon grew from ${rssStartBytes} to ${report.rssMaxBytes} bytes (seed ${seed})`)
  }
  return { seed, durationMs: Math.round(performance.now() - startedAt), ...report, rssStartBytes, rssEndBytes }
}
