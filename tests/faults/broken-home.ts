/** What the tests of this folder do to a home whose daemon is down, and how they look at volumes. */
import { readdir, readFile } from 'node:fs/promises'
import { createRequire } from 'node:module'
import { join } from 'node:path'
import { connect, type NbdConnection } from '@atoll/nbd-client'
import type Database from 'better-sqlite3'
import { expect } from 'vitest'
import { repositoryRoot, type TestHome } from '../test-home.ts'

export const mebibyte = 2 ** 20
export const slotBytes = 4096

/** What `volume show --json` has, as far as it matters here. */
export interface ShownVolume {
  readonly id: string
  readonly name: string
  readonly status: string
  readonly error: { readonly code: string; readonly message: string } | null
  readonly attachments: readonly { readonly uri: string }[]
  readonly usedBytes: number | null
}

export interface Finding {
  readonly severity: string
  readonly kind: string
  readonly object: string
  readonly message: string
}

/** `lengthBytes` that are the same for the same seed and differ in every slot. */
export function pattern(seed: number, lengthBytes: number): Buffer {
  const bytes = Buffer.alloc(lengthBytes, seed)
  for (let at = 0; at < lengthBytes; at += slotBytes) bytes.writeUInt32LE(at / slotBytes, at)
  return bytes
}

/** Attaches and connects. */
export async function attach(home: TestHome, volume: string): Promise<NbdConnection> {
  return await connect(home.cli('volume', 'attach', volume, '--format', 'uri'))
}

export function show(home: TestHome, volume: string): ShownVolume {
  return home.json<ShownVolume>('volume', 'show', volume)
}

/** What a check finds: of the pool, or the one that a command makes. */
export function check(home: TestHome, ...command: readonly string[]): Finding[] {
  const words = command.length > 0 ? command : ['pool', 'check', 'default']
  // Exit code 1 says that there are errors; the document is there either way.
  const { findings } = JSON.parse(home.run(...words, '--json').stdout) as { findings: Finding[] }
  // How full the disk of this machine is does not matter.
  return findings.filter(({ kind }) => kind !== 'low-space')
}

/** A volume that the others have nothing to do with; `expectServed` sees that it still works. */
export async function makeOther(home: TestHome): Promise<void> {
  home.cli('volume', 'create', 'other', '--size', '16M')
  await using client = await attach(home, 'other')
  await client.write(0, pattern(0x5a, mebibyte))
  await client.flush()
}

export async function expectServed(home: TestHome): Promise<void> {
  const { status, error } = show(home, 'other')
  expect({ status, error }).toEqual({ status: 'in-use', error: null })
  await using client = await attach(home, 'other')
  expect(await client.read(0, mebibyte)).toEqual(pattern(0x5a, mebibyte))
  await client.write(2 * mebibyte, pattern(1, slotBytes))
  await client.flush()
  expect(await client.read(2 * mebibyte, slotBytes)).toEqual(pattern(1, slotBytes))
}

/** The volume is in error, attaching it is refused for the same reason, and everything else of the daemon works. */
export async function expectOnlyBroken(home: TestHome, volume: string, code: string, ...named: string[]): Promise<void> {
  const { id, status, error } = show(home, volume)
  expect({ status, error }).toEqual({ status: 'error', error: { code, message: expect.any(String) as string } })
  const refused = home.failure('volume', 'attach', volume)
  expect(refused.code).toBe(code)
  for (const what of [id, ...named]) {
    expect(error?.message).toContain(what)
    expect(refused.message).toContain(what)
  }
  expect(home.json<ShownVolume[]>('volume', 'list').map(({ name }) => name)).toContain(volume)
  expect(home.json<{ error: unknown }>('pool', 'show', 'default').error).toBe(null)
  await expectServed(home)
}

/** Runs `fn` on the catalog's tables. The daemon is down. */
export function inCatalog<T>(home: TestHome, fn: (database: Database.Database) => T): T {
  const database = new Sqlite(join(home.path, 'catalog.db'))
  try {
    return fn(database)
  } finally {
    database.close()
  }
}

/** Ids of the layers of a volume: the one it writes, and the one its next snapshot takes. */
export function layersOf(home: TestHome, volume: string): { active: string; next: string } {
  return inCatalog(home, (database) => {
    const layer = (which: string): string =>
      database
        .prepare(
          `select layers.id from layers join volumes on volumes.${which}_alias = layers.alias
           join resources on resources.id = volumes.id where resources.name = ?`,
        )
        .pluck()
        .get(volume) as string
    return { active: layer('active'), next: layer('next') }
  })
}

export function poolPath(home: TestHome, ...parts: string[]): string {
  return join(home.path, 'pools', 'default', ...parts)
}

export function layerPath(home: TestHome, layerId: string): string {
  return poolPath(home, 'layers', `${layerId}.layer`)
}

/** The journal segments of a layer, oldest first. */
export async function segmentPaths(home: TestHome, layerId: string): Promise<string[]> {
  const names = (await readdir(poolPath(home, 'journal'))).filter((name) => name.startsWith(layerId))
  return names.toSorted().map((name) => poolPath(home, 'journal', name))
}

/** Offsets of the frames in a segment, by their magic (native/io/src/journal/format.rs). */
export async function frameOffsets(segment: string): Promise<number[]> {
  const bytes = await readFile(segment)
  const offsets: number[] = []
  for (let at = 64; at < bytes.length; at += 16) if (bytes.toString('latin1', at, at + 4) === 'ATJF') offsets.push(at)
  return offsets
}

/** The catalog is core's, and so is the package that opens it. */
const Sqlite = createRequire(join(repositoryRoot, 'core', 'package.json'))('better-sqlite3') as typeof Database
