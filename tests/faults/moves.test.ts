/** Moves whose pools are full or away: what is refused beforehand, what fails in between, and what is waited for. */
import { randomBytes } from 'node:crypto'
import { rename, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { TestHome } from '../test-home.ts'
import { attach, mebibyte, pattern } from './broken-home.ts'
import { SmallDisk, whyNoSmallDisk } from './small-disk.ts'

const reason = await whyNoSmallDisk()
if (reason !== null) console.log(`the tests of moves to a full disk are skipped: ${reason}`)

const contentBytes = 12 * mebibyte

interface Job {
  readonly id: string
  readonly state: string
  readonly waiting: string | null
  readonly error: { readonly code: string; readonly message: string } | null
  readonly details: { readonly phase: string; readonly copiedBytes: number }
}
interface Started {
  readonly job: Job
}
interface Shown {
  readonly pool: string
  readonly readsFrom: readonly string[]
  readonly move: object | null
}

/** A home with a volume `disk` that has `contentBytes`. */
async function homeWithDisk(): Promise<TestHome> {
  const home = await TestHome.create()
  await home.start()
  home.cli('volume', 'create', 'disk', '--size', String(contentBytes))
  await using client = await attach(home, 'disk')
  await client.write(0, pattern(1, contentBytes))
  await client.flush()
  return home
}

async function requireContent(home: TestHome): Promise<void> {
  await using client = await attach(home, 'disk')
  expect(pattern(1, contentBytes).equals(await client.read(0, contentBytes))).toBe(true)
}

const jobOf = (home: TestHome, id: string): Job => home.json<Job>('job', 'show', id)
const storedBytes = (home: TestHome, pool: string): number => home.json<{ storedBytes: number }>('pool', 'show', pool).storedBytes
const makePool = (home: TestHome, name: string, path: string): string =>
  home.cli('pool', 'create', name, '--driver', 'file', '--option', `path=${path}`, '--set', 'reserve=0', '--set', 'low-space=off')

describe.skipIf(reason !== null)('a move to a disk', () => {
  test('that is too small is refused with the figures, and nothing is changed', async () => {
    await using home = await homeWithDisk()
    await using disk = await SmallDisk.mount(contentBytes / 2)
    makePool(home, 'small', join(disk.path, 'pool'))
    const { code, message } = home.failure('migrate', 'disk', '--to', 'small')
    expect(code).toBe('NO_SPACE')
    expect(message).toMatch(/12 MiB .* free/)
    expect(home.json<Shown>('volume', 'show', 'disk')).toMatchObject({ pool: 'default', readsFrom: [], move: null })
    expect(storedBytes(home, 'small')).toBe(0)
    await home.end()
  })

  test('that fills up meanwhile fails, says where and what to do, gives back what it had copied, and can be done again', async () => {
    await using disk = await SmallDisk.mount(2 * contentBytes)
    await using home = await homeWithDisk()
    makePool(home, 'small', join(disk.path, 'pool'))
    const { job } = home.json<Started>('migrate', 'disk', '--to', 'small', '--limit', '64K')
    await expect.poll(() => jobOf(home, job.id).details.copiedBytes).toBeGreaterThan(0)
    const filler = join(disk.path, 'filler')
    // As full as it gets.
    await writeFile(filler, randomBytes((await disk.freeBytes()) + mebibyte)).catch(() => undefined)
    await expect.poll(() => jobOf(home, job.id).state).toBe('failed')
    expect(jobOf(home, job.id).error).toMatchObject({
      code: 'NO_SPACE',
      message: expect.stringMatching(/^copying: .*start again/) as string,
    })
    expect(home.json<Shown>('volume', 'show', 'disk')).toMatchObject({ pool: 'default', move: null })
    await requireContent(home)
    await rm(filler)
    home.cli('pool', 'reclaim', 'small')
    expect(storedBytes(home, 'small')).toBeLessThan(mebibyte)
    home.cli('migrate', 'disk', '--to', 'small', '--wait')
    expect(home.json<Shown>('volume', 'show', 'disk')).toMatchObject({ pool: 'small', readsFrom: [] })
    await requireContent(home)
    expect(home.json<{ findings: unknown[] }>('check').findings).toEqual([])
    await home.end()
  })
})

describe('a move of which a pool is away', () => {
  test('is refused by the name of the pool, be it the target or where the volume is', async () => {
    await using home = await homeWithDisk()
    const [here, away] = [join(home.path, 'pools', 'other'), join(home.path, 'away')]
    makePool(home, 'other', here)
    home.cli('volume', 'create', 'there', '--size', '1M', '--pool', 'other')
    await home.end()
    await rename(here, away)
    await writeFile(here, 'no folder')
    await home.start()
    const target = home.failure('migrate', 'disk', '--to', 'other')
    const source = home.failure('migrate', 'there', '--to', 'default')
    const drained = home.failure('pool', 'drain', 'other', '--to', 'default')
    for (const { code, message } of [target, source, drained]) {
      expect(code).toBe('POOL_UNAVAILABLE')
      expect(message).toContain('other')
    }
    await requireContent(home)
  })

  test('while the daemon was down waits with the reason, and goes on when the pool is back', async () => {
    await using home = await homeWithDisk()
    const [here, away] = [join(home.path, 'pools', 'other'), join(home.path, 'away')]
    makePool(home, 'other', here)
    home.cli('volume', 'detach', 'disk')
    const { job } = home.json<Started>('migrate', 'disk', '--to', 'other', '--limit', '16K')
    await expect.poll(() => jobOf(home, job.id).details.phase).toBe('fill')
    await home.end('SIGKILL')
    await rename(here, away)
    await writeFile(here, 'no folder')
    await home.start()
    await expect.poll(() => jobOf(home, job.id).waiting).toContain('POOL_UNAVAILABLE')
    expect(home.cli('job', 'show', job.id)).toMatch(/^waiting: +copying: POOL_UNAVAILABLE/m)
    expect(home.cli('volume', 'show', 'disk')).toMatch(/^moving: +to other/m)
    home.cli('job', 'limit', job.id, 'none')
    await rm(here)
    await rename(away, here)
    await expect.poll(() => jobOf(home, job.id).state).toBe('done')
    await requireContent(home)
  })
})
