import { expect, test } from 'vitest'
import { Bench, bytes, leaf, Random, slot } from './test-bench.ts'

/** Slots that are written and compared. */
const slotCount = 24
const stepCount = 60
const seeds = process.env['ATOLL_TEST_SEED'] === undefined ? [11, 12, 13] : [Number(process.env['ATOLL_TEST_SEED'])]

/** What each resource reads, a byte for each slot, and where its home is. */
interface Modelled {
  readonly id: string
  readonly kind: 'volume' | 'snapshot'
  readonly home: string
  readonly content: Uint8Array
  readonly volumeId: string | null
}

class Walk {
  readonly random: Random
  readonly bench: Bench
  readonly resources = new Map<string, Modelled>()
  #names = 0

  constructor(bench: Bench, seed: number) {
    this.bench = bench
    this.random = new Random(seed)
  }

  get #volumes(): Modelled[] {
    return [...this.resources.values()].filter((row) => row.kind === 'volume')
  }

  #name(): string {
    this.#names += 1
    return `n${this.#names}`
  }

  async step(): Promise<string> {
    const { random } = this
    const what = random.pick(['create', 'write', 'write', 'write', 'snapshot', 'clone', 'across', 'delete', 'replica', 'reclaim'])
    if (what === 'create' || this.resources.size === 0) await this.#create()
    else if (what === 'write') await this.#write()
    else if (what === 'snapshot') await this.#snapshot()
    else if (what === 'clone' || what === 'across') await this.#clone(what === 'across')
    else if (what === 'delete') await this.#delete()
    else if (what === 'replica') await this.#addReplica()
    else await this.reclaim()
    return what
  }

  async #create(): Promise<void> {
    const home = this.random.pick(this.bench.poolIds)
    const { id } = await this.bench.volume(this.#name(), leaf, undefined, home)
    this.resources.set(id, { id, kind: 'volume', home, content: new Uint8Array(slotCount), volumeId: null })
  }

  async #write(): Promise<void> {
    const { bench, random } = this
    if (this.#volumes.length === 0) return
    const { id, content } = random.pick(this.#volumes)
    const device = bench.mapper.opened(id)?.device ?? (await bench.attach(id))
    for (let count = 0; count < 4; count += 1) {
      const [at, value] = [random.below(slotCount), 1 + random.below(255)]
      await device.write(at * slot, bytes(value))
      content[at] = value
    }
  }

  async #snapshot(): Promise<void> {
    if (this.#volumes.length === 0) return
    const volume = this.random.pick(this.#volumes)
    const { id } = await this.bench.snapshot(volume.id, this.#name())
    this.resources.set(id, { ...volume, id, kind: 'snapshot', content: volume.content.slice(), volumeId: volume.id })
  }

  async #clone(isAcross: boolean): Promise<void> {
    const { bench, random } = this
    const source = random.pick([...this.resources.values()])
    const home = isAcross ? random.pick(bench.poolIds) : source.home
    // As everybody does who comes from another pool: what it will read there is there first.
    if (home !== source.home) await this.#cover(source, home)
    const { id } = await bench.volume(this.#name(), leaf, source.id, home)
    this.resources.set(id, { id, kind: 'volume', home, content: source.content.slice(), volumeId: null })
  }

  /** What a resource refers to is filled into the replicas that it reads as one of another pool. */
  async #cover(source: Modelled, home: string): Promise<void> {
    const { bench } = this
    if (source.kind === 'volume') await bench.mapper.checkpoint(source.id).catch(() => undefined)
    await bench.cover(source.id, home)
  }

  async #delete(): Promise<void> {
    const { bench, random } = this
    const gone = random.pick([...this.resources.values()])
    const ids = [gone.id, ...[...this.resources.values()].filter((row) => row.volumeId === gone.id).map((row) => row.id)]
    if (bench.mapper.isOpen(gone.id)) await bench.mapper.close(gone.id)
    await bench.mapper.deleteResource(gone.id, { withSnapshots: true })
    for (const id of ids) this.resources.delete(id)
  }

  async #addReplica(): Promise<void> {
    const { bench, random } = this
    const sealed = await bench.layers('sealed')
    if (sealed.length === 0) return
    const { alias } = random.pick(sealed)
    const poolId = random.pick(bench.poolIds)
    if ((await bench.replicas(alias))[poolId] === undefined) await bench.addReplica(alias, poolId)
    // As a drain does it: the others fall back on this one from now on.
    if (random.below(3) === 0) await bench.promote(alias, poolId)
  }

  /** Frees what may be freed; then everything reads as it should, and each replica holds what its readers need and nothing else. */
  async reclaim(): Promise<void> {
    const { bench } = this
    await bench.mapper.reclaim(null)
    for (const { id, content } of this.resources.values()) {
      const read = await bench.read(id, 0, slotCount * slot)
      const found = [...content.keys()].map((at) => read[at * slot])
      const wrong = found.findIndex((value, at) => value !== content[at])
      if (wrong >= 0) throw new Error(`slot ${wrong} of ${id} reads ${found[wrong]}, not ${content[wrong]}`)
    }
    const surplus = await bench.findSurplus()
    if (surplus !== null) throw new Error(surplus)
  }
}

test.each(seeds)(
  'whatever is made, shared, copied and deleted over several pools, a reclaim keeps what is read and nothing else (seed %i)',
  async (seed) => {
    const bench = await Bench.open({ pools: 3 })
    const steps: string[] = []
    try {
      const walk = new Walk(bench, seed)
      for (let count = 0; count < stepCount; count += 1) steps.push(await walk.step())
      await walk.reclaim()
      expect((await bench.mapper.check({ deep: true })).findings).toEqual([])
      for (const id of walk.resources.keys()) if (bench.mapper.isOpen(id)) await bench.mapper.close(id)
      for (const { id, kind } of [...walk.resources.values()].toSorted((a, b) => a.kind.localeCompare(b.kind)))
        if (kind === 'snapshot') await bench.mapper.deleteResource(id)
      for (const { id, kind } of walk.resources.values()) if (kind === 'volume') await bench.mapper.deleteResource(id)
      await bench.mapper.reclaim(null)
      for (const poolId of bench.poolIds) expect(await bench.mapper.pools.status(poolId)).toMatchObject({ storedBytes: 0 })
    } catch (error) {
      throw new Error(`seed ${seed}, after the steps ${steps.join(' ')}`, { cause: error })
    } finally {
      await bench.close()
    }
  },
  120_000,
)
