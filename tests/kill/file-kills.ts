/**
 * kill -9 of the real daemon while files are put, replaced, read and deleted, several at a time and several of one name. Who
 * sends them knows what was answered. After each kill the daemon is started again: every name must mean what was answered
 * last for it, or what was being put or deleted when the daemon died, whole; and nothing else may be there.
 */
import { createHash } from 'node:crypto'
import { request } from 'node:http'
import { join } from 'node:path'
import { Random } from '../crash/random.ts'
import { TestHome } from '../test-home.ts'

export interface FileKillReport {
  kills: number
  puts: number
  deletes: number
  reads: number
}

const senderCount = 6
const nameCount = 8
const container = 'c'
/** Answers after which the daemon is killed, at most. */
const answersMax = 60

/** MD5 of what a name means; null: nothing. */
type Content = string | null

class Oracle {
  /** What was answered last. While a name is changed by several at once, any of them may have been the last. */
  readonly possible = new Map<string, Set<Content>>()
  readonly #underWay = new Map<string, number>()
  /** Names that several changed at once since they were last looked at. */
  readonly #crowded = new Set<string>()

  begin(name: string, content: Content): void {
    this.#underWay.set(name, (this.#underWay.get(name) ?? 0) + 1)
    this.#of(name).add(content)
  }

  /** Answered: what was there before cannot be there any more, unless others are still changing it. */
  answered(name: string, content: Content): void {
    const left = (this.#underWay.get(name) ?? 1) - 1
    this.#underWay.set(name, left)
    if (left === 0 && !this.#crowded.has(name)) this.possible.set(name, new Set([content]))
    if (left > 0) this.#crowded.add(name)
  }

  /** Looked at while nobody changes anything. */
  settle(name: string, content: Content): void {
    this.possible.set(name, new Set([content]))
    this.#underWay.delete(name)
    this.#crowded.delete(name)
  }

  #of(name: string): Set<Content> {
    const known = this.possible.get(name) ?? new Set<Content>([null])
    this.possible.set(name, known)
    return known
  }
}

interface Answer {
  readonly status: number
  readonly body: Buffer
}

/** One request of the admin socket; null: the daemon died. */
async function ask(
  home: TestHome,
  method: string,
  path: string,
  query: Record<string, string>,
  body?: Buffer,
): Promise<Answer | null> {
  const { promise, resolve } = Promise.withResolvers<Answer | null>()
  const sent = request(
    {
      socketPath: join(home.path, 'admin.sock'),
      method,
      path: `${path}?${new URLSearchParams(query).toString()}`,
      headers: body === undefined ? {} : { 'content-type': 'application/octet-stream', 'content-length': body.length },
    },
    (response) => {
      const parts: Buffer[] = []
      response.on('data', (part: Buffer) => parts.push(part))
      response.on('error', () => resolve(null))
      response.on('end', () =>
        resolve(response.complete ? { status: response.statusCode ?? 0, body: Buffer.concat(parts) } : null),
      )
    },
  )
  sent.on('error', () => resolve(null))
  sent.end(body)
  return await promise
}

/** What anybody ever put. */
const everPut = new Set<string>()

const md5 = (content: Buffer): string => createHash('md5').update(content).digest('hex')

export async function runFileKills(options: { home: string; seed: number; killCount: number }): Promise<FileKillReport> {
  const report: FileKillReport = { kills: 0, puts: 0, deletes: 0, reads: 0 }
  const random = new Random(options.seed)
  const oracle = new Oracle()
  const home = TestHome.at(options.home)
  const names = Array.from({ length: nameCount }, (_, index) => `file-${index}`)
  await home.start()
  try {
    await home.jsonMeanwhile('file', 'container', 'create', container)
    // How full the disk of this machine is does not matter.
    await home.jsonMeanwhile('pool', 'set', 'default', 'low-space=off')
    for (; report.kills < options.killCount; report.kills += 1) {
      let answersLeft = random.between(1, answersMax)
      let dead = false
      const send = async (): Promise<void> => {
        while (!dead) {
          const name = random.pick(names)
          const path = `${container}/${name}`
          const roll = random.below(100)
          if (roll < 20) {
            const answer = await ask(home, 'GET', '/v1/file/content', { path })
            if (answer?.status === 200) {
              report.reads += 1
              const found = md5(answer.body)
              if (!everPut.has(found)) throw new Error(`a read of ${path} found bytes that nobody put`)
            }
          } else if (roll < 30) {
            oracle.begin(name, null)
            const answer = await ask(home, 'DELETE', '/v1/file', { path })
            if (answer !== null) {
              // One that was not there is as good as deleted.
              oracle.answered(name, null)
              report.deletes += 1
            }
          } else {
            const content = Buffer.alloc(random.between(8, 300_000), random.below(256))
            // No two are alike.
            content.writeUInt32LE(everPut.size, content.length - 4)
            const etag = md5(content)
            everPut.add(etag)
            oracle.begin(name, etag)
            const answer = await ask(home, 'POST', '/v1/file/content', { path }, content)
            if (answer !== null && answer.status !== 200) throw new Error(`a put was refused: ${String(answer.body)}`)
            if (answer !== null) {
              oracle.answered(name, etag)
              report.puts += 1
            }
          }
          answersLeft -= 1
          if (answersLeft === 0 && !dead) {
            dead = true
            await home.end('SIGKILL')
          }
        }
      }
      await Promise.all(Array.from({ length: senderCount }, send))
      await home.start()
      await checkAll(home, names, oracle)
    }
    for (const name of names) await ask(home, 'DELETE', '/v1/file', { path: `${container}/${name}` })
    await home.jsonMeanwhile('pool', 'reclaim', 'default')
    const { storedBytes } = await home.jsonMeanwhile<{ storedBytes: number }>('pool', 'show', 'default')
    if (storedBytes !== 0) throw new Error(`${storedBytes} bytes are left although every file was deleted`)
  } finally {
    await home.end('SIGKILL')
  }
  return report
}

async function checkAll(home: TestHome, names: readonly string[], oracle: Oracle): Promise<void> {
  const listed = await home.jsonMeanwhile<{ name: string; etag: string; sizeBytes: number }[]>('file', 'list', container)
  for (const name of names) {
    const file = listed.find((each) => each.name === name)
    const possible = oracle.possible.get(name) ?? new Set<Content>([null])
    const content = file?.etag ?? null
    if (!possible.has(content)) throw new Error(`${name} is ${content} after a kill; possible were ${[...possible].join(', ')}`)
    if (file !== undefined) {
      const answer = await ask(home, 'GET', '/v1/file/content', { path: `${container}/${name}` })
      if (answer === null || md5(answer.body) !== file.etag) throw new Error(`${name} has other bytes than its MD5 says`)
    }
    oracle.settle(name, content)
  }
  const [counted] = await home.jsonMeanwhile<{ fileCount: number; sizeBytes: number }[]>('file', 'list')
  const sizeBytes = listed.reduce((sum, file) => sum + file.sizeBytes, 0)
  if (counted?.fileCount !== listed.length || counted.sizeBytes !== sizeBytes) {
    throw new Error(`${listed.length} files with ${sizeBytes} bytes are counted as ${JSON.stringify(counted)}`)
  }
  if (listed.length > names.length) throw new Error(`${listed.length} files instead of at most ${names.length}`)
  const { findings } = await home.jsonMeanwhile<{ findings: unknown[] }>('check')
  if (findings.length > 0) throw new Error(`check finds ${JSON.stringify(findings)}`)
}
