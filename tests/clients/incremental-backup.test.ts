/**
 * Incremental backup by tools that are not ours: generation after generation only what changed since an earlier snapshot is read,
 * and every backup is byte for byte the volume as it was.
 */
import { copyFileSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { connect, type NbdConnection } from '@atoll/nbd-client'
import { describeWithTools, pythonLibnbdTool } from '@atoll/nbd-client/testing'
import { hasPrograms } from '../cli/test-programs.ts'
import { generator } from '../fuzz/random.ts'
import { repositoryRoot, runProgram } from '../test-home.ts'
import { ClientStand, diskBytes, fileDifference, KiB, MiB } from './client-stand.ts'
import { runClient } from './run-client.ts'

const slot = 4 * KiB
const seed = Number(process.env['ATOLL_SEED'] ?? 20_261_121)

interface Generation {
  readonly name: string
  /** The volume when the snapshot was taken. */
  readonly content: Buffer
  /** For each earlier generation the slots that were touched between it and this one. */
  readonly touchedSince: ReadonlyMap<string, ReadonlySet<number>>
}

/** A volume, what it holds, and its snapshots. Every step is random and known. */
class History {
  readonly name: string
  readonly uri: string
  readonly generations: Generation[] = []
  private readonly stand: ClientStand
  private readonly random: (below: number) => number
  private content: Buffer
  private touchedSince = new Map<string, Set<number>>()

  constructor(stand: ClientStand, name: string, random: (below: number) => number) {
    this.stand = stand
    this.name = name
    this.random = random
    this.uri = stand.clone(name)
    this.content = Buffer.from(stand.content)
  }

  /** Writes, zeroes and discards, most of them near each other, so that they meet. */
  async change(count: number): Promise<void> {
    await using disk = await connect(this.uri)
    for (let index = 0; index < count; index += 1) await this.changeOne(disk)
    await disk.flush()
  }

  private async changeOne(disk: NbdConnection): Promise<void> {
    const { random } = this
    const near = random(2) === 0 ? random(4 * MiB) : random(this.content.length)
    const lengthBytes = random(3) === 0 ? 1 + random(300 * KiB) : 1 + random(6 * slot)
    const start = Math.min(near, this.content.length - lengthBytes)
    const kind = random(5)
    if (kind < 2) {
      const bytes = Buffer.alloc(lengthBytes, 1 + random(255))
      await disk.write(start, bytes)
      bytes.copy(this.content, start)
    } else if (kind === 2) {
      // The same bytes once more are a write too.
      await disk.write(start, this.content.subarray(start, start + lengthBytes))
    } else if (kind === 3) {
      await disk.writeZeroes(start, lengthBytes)
      this.content.fill(0, start, start + lengthBytes)
    } else {
      // A discard of whole slots: of others it is not defined what they read as.
      const from = Math.ceil(start / slot) * slot
      const end = Math.floor((start + lengthBytes) / slot) * slot
      if (end <= from) return
      await disk.trim(from, end - from)
      this.content.fill(0, from, end)
    }
    this.touch(start, start + lengthBytes)
  }

  snapshot(name: string): Generation {
    this.stand.home.cli('snapshot', 'create', `${this.name}@${name}`)
    const touchedSince = new Map([...this.touchedSince].map(([since, slots]) => [since, new Set(slots)]))
    const generation = { name, content: Buffer.from(this.content), touchedSince }
    this.generations.push(generation)
    this.touchedSince.set(name, new Set())
    return generation
  }

  resize(sizeBytes: number): void {
    this.stand.home.cli('volume', 'detach', this.name)
    this.stand.home.cli('volume', 'resize', this.name, String(sizeBytes), '--force')
    this.stand.attach(this.name)
    const before = this.content
    this.content = Buffer.alloc(sizeBytes)
    before.copy(this.content)
    this.touch(sizeBytes, before.length)
  }

  rollBack(to: Generation): void {
    this.stand.home.cli('volume', 'detach', this.name)
    this.stand.home.cli('snapshot', 'rollback', `${this.name}@${to.name}`)
    this.stand.attach(this.name)
    this.content = Buffer.from(to.content)
    this.touchedSince = new Map(
      this.generations.map((generation) => {
        if (generation === to) return [to.name, new Set()]
        const between = to.touchedSince.get(generation.name) ?? generation.touchedSince.get(to.name)
        return [generation.name, new Set(between)]
      }),
    )
  }

  private touch(start: number, end: number): void {
    for (const slots of this.touchedSince.values()) {
      for (let at = Math.floor(start / slot); at * slot < end; at += 1) slots.add(at)
    }
  }
}

/** Says where a list of changed ranges is wrong: a difference that is not in it, or a slot in it that nobody touched. */
function changesTrouble(changed: readonly (readonly [number, number])[], base: Generation, now: Generation): string | null {
  const listed = new Set<number>()
  for (const [start, lengthBytes] of changed) for (let at = start; at < start + lengthBytes; at += slot) listed.add(at / slot)
  const touched = now.touchedSince.get(base.name)
  const before = Buffer.alloc(now.content.length)
  base.content.copy(before)
  for (let at = 0; at * slot < now.content.length; at += 1) {
    const end = (at + 1) * slot
    if (!listed.has(at) && before.compare(now.content, at * slot, end, at * slot, end) !== 0) return `slot ${at} is missing`
    if (listed.has(at) && touched?.has(at) !== true) return `slot ${at} was not touched`
  }
  return null
}

describeWithTools('an incremental backup', [pythonLibnbdTool], () => {
  let stand: ClientStand
  beforeAll(async () => {
    stand = await ClientStand.create()
  })
  afterAll(async () => {
    await stand?.[Symbol.asyncDispose]()
  })

  const attached = (volume: string, generation: string): string =>
    stand.home.cli('volume', 'attach', `${volume}@${generation}`, '--format', 'uri')

  /** The ranges that nbdinfo shows as changed, by offset and length. */
  async function changedRanges(uri: string, since: string): Promise<[number, number][]> {
    const printed = await runClient('nbdinfo', '--json', `--map=qemu:dirty-bitmap:${since}`, uri)
    const entries = JSON.parse(printed) as { offset: number; length: number; type: number }[]
    return entries.filter(({ type }) => type % 2 === 1).map(({ offset, length }) => [offset, length])
  }

  /** The same ranges as QEMU sees them: its block driver shows what is dirty as not there. */
  async function changedRangesOfQemu(uri: string, since: string): Promise<[number, number][]> {
    const url = new URL(uri)
    const options = [
      'driver=nbd',
      'server.type=unix',
      `server.path=${url.searchParams.get('socket')}`,
      `export=${url.pathname.slice(1)}`,
      `x-dirty-bitmap=qemu:dirty-bitmap:${since}`,
    ]
    const printed = await runClient('qemu-img', 'map', '--output=json', '--image-opts', options.join(','))
    const entries = JSON.parse(printed) as { start: number; length: number; data: boolean }[]
    return entries.filter(({ data }) => !data).map(({ start, length }) => [start, length])
  }

  /** A qcow2 file that holds what changed since `base`, a qcow2 file too, and names it as its backing file. */
  async function overlay(uri: string, ranges: readonly [number, number][], path: string, basePath: string): Promise<void> {
    await runClient('qemu-img', 'create', '-q', '-f', 'qcow2', '-b', uri, '-F', 'raw', path)
    // QEMU copies on read what the backing file, here the export, has.
    const reads = ranges.flatMap(([start, lengthBytes]) => ['-c', `read ${start} ${lengthBytes}`])
    for (let from = 0; from < reads.length; from += 2000) {
      expect(await runClient('qemu-io', '-C', '-f', 'qcow2', ...reads.slice(from, from + 2000), path)).not.toMatch(/fail/i)
    }
    await runClient('qemu-img', 'rebase', '-u', '-f', 'qcow2', '-b', basePath, '-F', 'qcow2', path)
  }

  test.skipIf(!hasPrograms('nbdinfo', 'nbdcopy', 'qemu-img', 'qemu-io'))(
    `of a volume in use is the volume as of its snapshot, through resizes, a rollback and a crash (ATOLL_SEED=${seed})`,
    async () => {
      const random = generator(seed)
      const history = new History(stand, 'worked', random)
      const path = (generation: Generation, extension: string): string => stand.file(`${generation.name}.${extension}`)
      const full = async (generation: Generation): Promise<void> => {
        await runClient('nbdcopy', attached(history.name, generation.name), path(generation, 'raw'))
        await runClient('qemu-img', 'convert', '-f', 'raw', '-O', 'qcow2', path(generation, 'raw'), path(generation, 'qcow2'))
        expect(await fileDifference(path(generation, 'raw'), generation.content)).toBeNull()
      }
      /** Backs up by both ways: QEMU's onto the generation before, libnbd's onto any. */
      const backUp = async (generation: Generation): Promise<void> => {
        const uri = attached(history.name, generation.name)
        const earlier = history.generations.slice(0, history.generations.indexOf(generation))
        for (const base of earlier) {
          const ranges = await changedRanges(uri, base.name)
          expect(changesTrouble(ranges, base, generation), `${base.name} to ${generation.name}`).toBeNull()
        }
        const before = earlier.at(-1)!
        const ranges = await changedRangesOfQemu(uri, before.name)
        expect(ranges).toEqual(await changedRanges(uri, before.name))
        await overlay(uri, ranges, path(generation, 'qcow2'), path(before, 'qcow2'))
        const restored = stand.file('restored.raw')
        await runClient('qemu-img', 'convert', '-f', 'qcow2', '-O', 'raw', path(generation, 'qcow2'), restored)
        expect(await fileDifference(restored, generation.content), `${generation.name} of QEMU`).toBeNull()

        const base = earlier[random(earlier.length)]!
        copyFileSync(path(base, 'raw'), path(generation, 'raw'))
        const script = join(import.meta.dirname, 'copy_changes.py')
        const printed = await runClient('/usr/bin/python3', script, uri, base.name, path(generation, 'raw'))
        const { changed, readBytes } = JSON.parse(printed) as { changed: [number, number][]; readBytes: number }
        expect(await fileDifference(path(generation, 'raw'), generation.content), `${generation.name} of libnbd`).toBeNull()
        expect(changed).toEqual(await changedRanges(uri, base.name))
        expect(readBytes).toBeLessThan(changed.reduce((sum, [, lengthBytes]) => sum + lengthBytes, 0))
      }

      const first = history.snapshot('first')
      // What is written while a backup is made belongs to the next.
      await history.change(60)
      await full(first)
      const second = history.snapshot('second')
      await history.change(40)
      await backUp(second)
      history.resize(diskBytes + 16 * MiB)
      await history.change(40)
      const grown = history.snapshot('grown')
      await backUp(grown)
      // What was cut off does not come back.
      history.resize(diskBytes - 8 * MiB)
      history.resize(diskBytes + 16 * MiB)
      await history.change(40)
      await backUp(history.snapshot('regrown'))
      history.rollBack(second)
      await history.change(20)
      await backUp(history.snapshot('rolled-back'))
      await history.change(40)
      await stand.crash()
      await history.change(20)
      await backUp(history.snapshot('after-crash'))

      // A chain is put back with the tools that made it.
      const uri = stand.empty('put-back')
      await runClient('qemu-img', 'convert', '-n', '-f', 'qcow2', '-O', 'raw', path(second, 'qcow2'), uri)
      await runClient('nbdcopy', uri, stand.file('put-back.raw'))
      expect(await fileDifference(stand.file('put-back.raw'), second.content)).toBeNull()
    },
  )

  test.skipIf(!hasPrograms('nbdinfo', 'nbdcopy', 'qemu-img', 'qemu-io'))(
    'reads a volume that is at rest without a second snapshot',
    async () => {
      const history = new History(stand, 'resting', generator(seed + 1))
      const before = history.snapshot('before')
      await runClient('nbdcopy', history.uri, stand.file('resting.raw'))
      await history.change(50)
      const now = history.snapshot('now')
      const script = join(import.meta.dirname, 'copy_changes.py')
      await runClient('/usr/bin/python3', script, history.uri, before.name, stand.file('resting.raw'))
      expect(await fileDifference(stand.file('resting.raw'), now.content)).toBeNull()
    },
  )
})

test.skipIf(!hasPrograms('nbdinfo', 'qemu-img', 'qemu-io'))(
  'the commands of the README for incremental backup, pasted into a shell, back up and restore',
  () => {
    const readme = readFileSync(join(repositoryRoot, 'README.md'), 'utf8')
    const commands = [...readme.matchAll(/^```sh backup\n([^]*?)^```$/gm)].map((match) => match[1] ?? '').join('')
    expect(commands).toContain('qemu:dirty-bitmap:monday')
    const script = `set -euo pipefail\ntrap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n${commands}echo it is over\n`
    const pasted = runProgram('bash', ['-c', script], { cwd: repositoryRoot })
    expect(pasted.exitCode, `${pasted.stdout}\n${pasted.stderr}`).toBe(0)
    expect(pasted.stdout).toContain('Images are identical.')
    expect(pasted.stdout).toMatch(/it is over\n$/)
  },
)
