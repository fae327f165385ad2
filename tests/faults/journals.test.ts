import assert from 'node:assert/strict'
import { appendFile, cp, mkdtemp, open, readFile, rm, stat, truncate } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { isDeepStrictEqual } from 'node:util'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { TestHome } from '../test-home.ts'
import {
  attach,
  expectOnlyBroken,
  expectServed,
  frameOffsets,
  layersOf,
  makeOther,
  pattern,
  poolPath,
  segmentPaths,
  show,
  slotBytes,
} from './broken-home.ts'

/** Each is written and flushed alone, so each is one frame. */
const flushedSlots = 6
/** Tries to make the home that the tests begin with. */
const triesMax = 20
/** The frame of one delta: header 32, delta 16. */
const frameBytes = 48
/** Where the next frame would go; up to the file's end there is room for more, in zeros. */
const framesEndBytes = 64 + (flushedSlots + 1) * frameBytes

let killed: string
let folder: string
/** Path of the one journal segment of `disk`, below the home. */
let segment: string
let layerId: string

/** A home whose daemon was killed when `disk` had `flushedSlots` flushed slots over a snapshot, and one more frame. */
beforeEach(async () => {
  // Short, because the path of a socket has 107 bytes.
  folder = await mkdtemp(join(tmpdir(), 'atoll-'))
  killed = join(folder, 'h')
  await cp('/dev/null', join(folder, 'log'))
  const frames = Array.from({ length: flushedSlots + 1 }, (_, index) => 64 + index * frameBytes)
  const found: number[][] = []
  // Every five seconds the daemon writes maps down and begins the journal anew: where that came in between, once more.
  while (found.length < triesMax) {
    found.push(await makeKilled())
    if (isDeepStrictEqual(found.at(-1), frames)) return
    await rm(killed, { recursive: true })
  }
  assert.fail(`one frame for each flush is wanted, not ${JSON.stringify(found)}`)
})
afterEach(async () => await rm(folder, { recursive: true, force: true }))

/** Makes the home `killed`; returns where the frames of the journal of `disk` are. */
async function makeKilled(): Promise<number[]> {
  await using home = TestHome.at(killed, { logPath: join(folder, 'log') })
  await home.start()
  await makeOther(home)
  home.cli('volume', 'create', 'disk', '--size', '16M')
  home.cli('snapshot', 'create', 'disk@base')
  const client = await attach(home, 'disk')
  for (let slot = 0; slot <= flushedSlots; slot += 1) {
    await client.write(2 * slot * slotBytes, pattern(slot + 1, slotBytes))
    await client.flush()
  }
  await home.end('SIGKILL')
  layerId = layersOf(home, 'disk').active
  const segments = await segmentPaths(home, layerId)
  ;[segment] = segments as [string]
  return segments.length === 1 ? await frameOffsets(segment) : []
}

/** The killed home again, for one more try: what a test does to it is gone with it. */
async function again(fn: (home: TestHome) => Promise<void>): Promise<void> {
  const aside = join(folder, 'aside')
  await cp(killed, aside, { recursive: true, filter: (path) => !path.endsWith('.sock') })
  try {
    await using home = TestHome.at(killed, { logPath: join(folder, 'log') })
    await fn(home)
  } finally {
    await rm(killed, { recursive: true })
    await cp(aside, killed, { recursive: true })
    await rm(aside, { recursive: true })
  }
}

/** What the last slot reads as tells whether its frame counts. */
async function expectFlushed(home: TestHome, lastSlot: readonly ('written' | 'old')[]): Promise<void> {
  expect(show(home, 'disk')).toMatchObject({ status: 'in-use', error: null })
  const client = await attach(home, 'disk')
  for (let slot = 0; slot < flushedSlots; slot += 1) {
    expect(await client.read(2 * slot * slotBytes, slotBytes), `slot ${slot}`).toEqual(pattern(slot + 1, slotBytes))
    expect(await client.read((2 * slot + 1) * slotBytes, slotBytes), `behind slot ${slot}`).toEqual(Buffer.alloc(slotBytes))
  }
  const last = Buffer.from(await client.read(2 * flushedSlots * slotBytes, slotBytes))
  const found = last.equals(pattern(flushedSlots + 1, slotBytes))
    ? 'written'
    : last.equals(Buffer.alloc(slotBytes))
      ? 'old'
      : 'torn'
  expect(lastSlot).toContain(found)
  // The journal goes on.
  await client.write(20 * slotBytes, pattern(0x77, slotBytes))
  await client.flush()
  await client.disconnect()
  await home.end('SIGKILL')
  await home.start()
  const back = await attach(home, 'disk')
  expect(await back.read(20 * slotBytes, slotBytes)).toEqual(pattern(0x77, slotBytes))
  expect(await back.read(0, slotBytes)).toEqual(pattern(1, slotBytes))
  await back.disconnect()
  await expectServed(home)
}

describe('a journal whose last frame is torn', () => {
  test('opens with everything that was flushed before, wherever it was cut', async () => {
    const { size } = await stat(segment)
    for (const cutBytes of [1, 16, 33, frameBytes - 1, frameBytes]) {
      for (const restLength of [framesEndBytes - cutBytes, size]) {
        await again(async (home) => {
          // As after a power cut: what a living kernel kept of unflushed batches is gone.
          await rm(join(home.path, 'batch-logs'), { recursive: true })
          await truncate(segment, framesEndBytes - cutBytes)
          // The length arrived or it did not; zeros follow where it did.
          await truncate(segment, restLength)
          await home.start()
          // The frame ends in zeros of its own where less than its last byte is missing.
          await expectFlushed(home, cutBytes < 4 && restLength === size ? ['old', 'written'] : ['old'])
        })
      }
    }
  })

  test('opens with the batch log of the same boot, which may still have the last change', async () => {
    await again(async (home) => {
      await truncate(segment, framesEndBytes - 20)
      await home.start()
      await expectFlushed(home, ['old', 'written'])
    })
  })

  test('opens whatever follows the last good frame, zeros or rubbish', async () => {
    for (const tail of [Buffer.alloc(4096), Buffer.alloc(777, 'ATJF rubbish'), Buffer.from('ATJF')]) {
      await again(async (home) => {
        await truncate(segment, framesEndBytes)
        await appendFile(segment, tail)
        await home.start()
        await expectFlushed(home, ['written'])
      })
    }
  })
})

describe('a journal with a rotten frame in the middle', () => {
  test('keeps its volume closed, naming segment and offset, and nothing is cut or lost', async () => {
    await using home = TestHome.at(killed, { logPath: join(folder, 'log') })
    const rottenAt = 64 + frameBytes
    const file = await open(segment, 'r+')
    const { buffer } = await file.read(Buffer.alloc(1), 0, 1, rottenAt + 40)
    await file.write(Buffer.from([buffer.readUInt8() ^ 1]), 0, 1, rottenAt + 40)
    await file.close()
    const rotten = await readFile(segment)
    await home.start()
    const name = `${layerId} 0000000000000001`
    await expectOnlyBroken(home, 'disk', 'JOURNAL_CORRUPT', name, ` at ${rottenAt}`)

    // What frees space goes on around it, and leaves it alone.
    home.cli('volume', 'create', 'gone', '--size', '1M')
    home.cli('volume', 'delete', 'gone')
    home.cli('pool', 'reclaim', 'default')
    expect(await readFile(segment)).toEqual(rotten)
    expect(home.fail('snapshot', 'create', 'disk@now')).toBe('JOURNAL_CORRUPT')
    expect(home.fail('volume', 'create', 'copy', '--from', 'volume:disk')).toBe('JOURNAL_CORRUPT')
    // Its snapshot is served, and detached it still shows what is wrong.
    await using base = await attach(home, 'disk@base')
    expect(await base.read(0, slotBytes)).toEqual(Buffer.alloc(slotBytes))
    home.cli('volume', 'detach', 'disk')
    await expectOnlyBroken(home, 'disk', 'JOURNAL_CORRUPT', name)

    // The byte is as it was, say from a backup of the pool: everything is there.
    rotten[rottenAt + 40] = (rotten[rottenAt + 40] ?? 0) ^ 1
    await home.end()
    const repaired = await open(poolPath(home, 'journal', segment.split('/').at(-1) ?? ''), 'r+')
    await repaired.write(rotten, 0, rotten.length, 0)
    await repaired.close()
    await home.start()
    home.cli('volume', 'attach', 'disk')
    await expectFlushed(home, ['written'])
  })
})
