/**
 * kill -9 of the real daemon under load, and then its catalog is gone: the pool is imported, and everything must be as it was
 * answered. Four connections write, flush and trim a clone while volumes, snapshots, clones and files are made, rolled
 * back, deleted and reclaimed; an oracle in this process knows what was answered. The homes go on from round to round, so each
 * round imports what an import has made before.
 */
import { readdir, readFile, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { connect, type NbdConnection } from '@atoll/nbd-client'
import { Random } from '../crash/random.ts'
import { Load, readAll, sha256 } from '../kill/kills.ts'
import { checkWithin, SlotOracle, slotBytes } from '../kill/slot-oracle.ts'
import { TestHome } from '../test-home.ts'

export interface LossOptions {
  readonly home: string
  readonly seed: number
  readonly roundCount: number
  readonly onProgress?: (text: string) => void
}

export interface LossReport {
  rounds: number
  writes: number
  flushes: number
  /** Operations that were answered, by name. */
  operations: Record<string, number>
  importMsMax: number
}

const connectionCount = 4
const slotCount = 4096
const volumeBytes = slotCount * slotBytes
const keptMax = 6
const fileBytes = 100_000

/** Something whose content never changes. */
interface Fixed {
  readonly kind: 'snapshot' | 'clone' | 'file'
  readonly name: string
  /** null: what it has is between two bounds, and is looked at after the next import. */
  sha: string | null
  readonly bounds: { readonly lower: Uint32Array; readonly upper: Uint32Array } | null
}

interface Imported {
  readonly failed: readonly unknown[]
  readonly damages: readonly unknown[]
  readonly unknownLayers: readonly string[]
}

export async function runLosses(options: LossOptions): Promise<LossReport> {
  const report: LossReport = { rounds: 0, writes: 0, flushes: 0, operations: {}, importMsMax: 0 }
  const home = TestHome.at(options.home)
  await home.start()
  try {
    const run = new Losses(home, options, report)
    await run.prepare()
    for (let round = 0; round < options.roundCount; round += 1) await run.round(round)
    return report
  } finally {
    await home.end('SIGKILL')
  }
}

class Losses {
  readonly #home: TestHome
  readonly #options: LossOptions
  readonly #report: LossReport
  readonly #random: Random
  readonly #oracle = new SlotOracle(slotCount)
  readonly #fixed = new Map<string, Fixed>()
  /** Being made or deleted when the daemon was killed: there or not. */
  #uncertain: string | null = null
  #next = 1
  #victim = ''

  constructor(home: TestHome, options: LossOptions, report: LossReport) {
    this.#home = home
    this.#options = options
    this.#report = report
    this.#random = new Random(options.seed)
  }

  async prepare(): Promise<void> {
    const source = join(this.#home.path, 'base.raw')
    await writeFile(source, Buffer.alloc(volumeBytes))
    await this.#run('image', 'import', 'base', source, '--format', 'raw')
    await this.#run('volume', 'create', 'victim', '--from', 'image:base')
    await this.#run('volume', 'attach', 'victim')
    this.#victim = (await this.#run<{ id: string }>('volume', 'show', 'victim')).id
  }

  async round(round: number): Promise<void> {
    const context = `seed ${this.#options.seed}, round ${round}`
    const connections = await Promise.all(Array.from({ length: connectionCount }, () => this.#connect(this.#victim)))
    const loaded = { kills: 0, writes: 0, flushes: 0, snapshots: 0, restartMsMax: 0 }
    const load = new Load(connections, this.#oracle, this.#random, loaded)
    load.start()
    let isKilled = false
    const operations = this.#operate(() => isKilled)
    const operationCount = 2 + this.#random.below(6)
    await this.#answered(operationCount, operations)
    await load.writesReach(load.writes + 1 + this.#random.below(500))
    isKilled = true
    await this.#home.end('SIGKILL')
    await Promise.all([load.ended(), operations])
    this.#report.writes += loaded.writes
    this.#report.flushes += loaded.flushes

    for (const name of await readdir(this.#home.path)) {
      if (name.startsWith('catalog.')) await rm(join(this.#home.path, name))
    }
    await this.#home.start()
    const startedAt = performance.now()
    const imported = await this.#run<Imported>('pool', 'import', 'default', '--take-over')
    this.#report.importMsMax = Math.max(this.#report.importMsMax, performance.now() - startedAt)
    if (imported.failed.length + imported.damages.length > 0) throw new Error(`${context}: ${JSON.stringify(imported)}`)
    await this.#check(context)
    this.#report.rounds += 1
    this.#options.onProgress?.(`${context}: ${JSON.stringify(this.#report)}`)
  }

  #done = 0
  #wake: (() => void) | null = null

  async #answered(count: number, operations: Promise<void>): Promise<void> {
    const wanted = this.#done + count
    while (this.#done < wanted) {
      const more = new Promise<boolean>((resolve) => {
        this.#wake = () => resolve(true)
      })
      if (!(await Promise.race([more, operations.then(() => false)]))) throw new Error('the operations ended before the kill')
    }
  }

  /** One operation after the other until the daemon is killed. */
  async #operate(isKilled: () => boolean): Promise<void> {
    while (!isKilled()) {
      const { name, run } = this.#pick()
      try {
        await run()
      } catch (error) {
        if (!isKilled()) throw error
        return
      }
      this.#uncertain = null
      this.#report.operations[name] = (this.#report.operations[name] ?? 0) + 1
      this.#done += 1
      this.#wake?.()
    }
  }

  #pick(): { name: string; run: () => Promise<void> } {
    const of = (kind: Fixed['kind']) => [...this.#fixed.values()].filter((fixed) => fixed.kind === kind)
    const roll = this.#random.below(100)
    const number = this.#next
    this.#next += 1
    if (this.#fixed.size > keptMax || (roll < 15 && this.#fixed.size > 0)) {
      const fixed = this.#random.pick([...this.#fixed.values()])
      return { name: `delete ${fixed.kind}`, run: async () => await this.#delete(fixed) }
    }
    if (roll < 40) return { name: 'snapshot', run: async () => await this.#snapshot(`s${number}`) }
    const [snapshot] = of('snapshot')
    if (roll < 55 && snapshot !== undefined) return { name: 'clone', run: async () => await this.#clone(`c${number}`, snapshot) }
    const [clone] = of('clone')
    if (roll < 65 && clone !== undefined)
      return { name: 'rollback', run: async () => await this.#rollback(clone, `here${number}`) }
    if (roll < 85) return { name: 'file put', run: async () => await this.#put(`f${number}`) }
    if (roll < 92) return { name: 'reclaim', run: async () => void (await this.#run('pool', 'reclaim', 'default')) }
    return { name: 'create', run: async () => await this.#create(`c${number}`) }
  }

  async #snapshot(name: string): Promise<void> {
    const lower = this.#oracle.bounds().acknowledged
    this.#uncertain = name
    await this.#home.snapshotMeanwhile(`victim@${name}`)
    this.#fixed.set(name, { kind: 'snapshot', name, sha: null, bounds: { lower, upper: this.#oracle.bounds().issued } })
  }

  async #clone(name: string, snapshot: Fixed): Promise<void> {
    this.#uncertain = name
    await this.#run('volume', 'create', name, '--from', `snapshot:victim@${snapshot.name}`)
    this.#fixed.set(name, { kind: 'clone', name, sha: snapshot.sha, bounds: snapshot.bounds })
  }

  async #create(name: string): Promise<void> {
    this.#uncertain = name
    await this.#run('volume', 'create', name, '--size', String(volumeBytes))
    this.#fixed.set(name, { kind: 'clone', name, sha: sha256(new Uint8Array(volumeBytes)), bounds: null })
  }

  /** To a snapshot of its own that was just taken: another active layer, the same content. A kill may leave the snapshot. */
  async #rollback(clone: Fixed, name: string): Promise<void> {
    await this.#run('snapshot', 'create', `${clone.name}@${name}`)
    await this.#run('snapshot', 'rollback', `${clone.name}@${name}`)
    await this.#run('snapshot', 'delete', `${clone.name}@${name}`)
  }

  async #put(name: string): Promise<void> {
    const content = Buffer.alloc(fileBytes, `${name} of seed ${this.#options.seed} `)
    const path = join(this.#home.path, 'put.bin')
    await writeFile(path, content)
    this.#uncertain = name
    await this.#run('file', 'put', `box/${name}`, path)
    this.#fixed.set(name, { kind: 'file', name, sha: sha256(content), bounds: null })
  }

  async #delete(fixed: Fixed): Promise<void> {
    this.#uncertain = fixed.name
    // An earlier kill may have left the snapshot that a rollback is made to.
    if (fixed.kind === 'clone') await this.#run('volume', 'delete', fixed.name, '--with-snapshots')
    else if (fixed.kind === 'snapshot') await this.#run('snapshot', 'delete', `victim@${fixed.name}`)
    else await this.#run('file', 'delete', `box/${fixed.name}`)
    this.#fixed.delete(fixed.name)
  }

  async #check(context: string): Promise<void> {
    await this.#run('volume', 'attach', 'victim')
    const reader = await this.#connect(this.#victim)
    this.#oracle.settle(await readAll(reader), context)
    await reader.disconnect()
    const names = {
      clone: (await this.#run<{ name: string }[]>('volume', 'list')).map(({ name }) => name).filter((name) => name !== 'victim'),
      snapshot: (await this.#run<{ name: string }[]>('snapshot', 'list', 'victim')).map(({ name }) => name),
      file: await this.#files(),
    }
    for (const [kind, found] of Object.entries(names)) {
      for (const name of found) {
        if (this.#fixed.get(name)?.kind === kind) continue
        if (name !== this.#uncertain) throw new Error(`${context}: ${kind} ${name} came back from the dead`)
        await this.#forget(kind as Fixed['kind'], name)
      }
    }
    for (const fixed of this.#fixed.values()) {
      if (names[fixed.kind].includes(fixed.name)) await this.#compare(context, fixed)
      else if (fixed.name === this.#uncertain) this.#fixed.delete(fixed.name)
      else throw new Error(`${context}: ${fixed.kind} ${fixed.name} is gone`)
    }
    this.#uncertain = null
  }

  /** What was being made when the daemon was killed is there, and nobody knows what it should have. */
  async #forget(kind: Fixed['kind'], name: string): Promise<void> {
    await this.#delete({ kind, name, sha: null, bounds: null })
    this.#uncertain = null
  }

  async #files(): Promise<string[]> {
    const [box] = await this.#run<{ fileCount: number }[]>('file', 'list')
    if (box === undefined) return []
    const names = (await this.#run<{ name: string }[]>('file', 'list', 'box')).map(({ name }) => name)
    if (box.fileCount !== names.length) throw new Error(`${names.length} files are counted as ${box.fileCount}`)
    return names
  }

  async #compare(context: string, fixed: Fixed): Promise<void> {
    const content = await this.#read(fixed)
    const sha = sha256(content)
    if (fixed.sha === null && fixed.bounds !== null) {
      checkWithin(content, fixed.bounds.lower, fixed.bounds.upper, `${context}: ${fixed.kind} ${fixed.name}`)
      fixed.sha = sha
    }
    if (fixed.sha !== sha) throw new Error(`${context}: ${fixed.kind} ${fixed.name} changed: ${fixed.sha} was ${sha}`)
  }

  async #read(fixed: Fixed): Promise<Uint8Array> {
    if (fixed.kind === 'file') {
      const path = join(this.#home.path, 'got.bin')
      await rm(path, { force: true })
      await this.#run('file', 'get', `box/${fixed.name}`, path)
      return await readFile(path)
    }
    const volume = fixed.kind === 'clone' ? fixed.name : 'reader'
    if (fixed.kind === 'snapshot') await this.#run('volume', 'create', volume, '--from', `snapshot:victim@${fixed.name}`)
    await this.#run('volume', 'attach', volume)
    const { id } = await this.#run<{ id: string }>('volume', 'show', volume)
    const connection = await this.#connect(id)
    const content = await readAll(connection)
    await connection.disconnect()
    await this.#run('volume', 'detach', volume)
    if (fixed.kind === 'snapshot') await this.#run('volume', 'delete', volume)
    return content
  }

  async #connect(exportName: string): Promise<NbdConnection> {
    return await connect({ path: join(this.#home.path, 'nbd.sock') }, { exportName })
  }

  async #run<T>(...args: string[]): Promise<T> {
    return await this.#home.jsonMeanwhile<T>(...args)
  }
}
