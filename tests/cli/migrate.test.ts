/** `atoll migrate`, `atoll pool drain` and `atoll job limit` as they are typed. */
import { randomFillSync } from 'node:crypto'
import { writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { connect } from '@atoll/nbd-client'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { TestHome } from '../test-home.ts'

const mib = 2 ** 20

interface Plan {
  readonly resources: { readonly kind: string; readonly name: string }[]
  readonly bytesToCopy: number
  readonly bytesToOffload: number
  readonly bytesThere: number
  readonly targetFreeBytes: number
}
interface Job {
  readonly id: string
  readonly kind: string
  readonly state: string
  readonly params: { readonly limitBytesPerSecond: number | null }
  readonly result: { readonly copiedBytes: number; readonly offloadedBytes: number; readonly freedBytes: number } | null
}
interface Started {
  readonly plan: Plan
  readonly job: Job | null
}
interface Volume {
  readonly pool: string
  readonly readsFrom: string[]
  readonly move: { readonly jobId: string; readonly to: string; readonly state: string } | null
}
interface Pool {
  readonly storedBytes: number
  readonly draining: { readonly jobId: string; readonly to: string } | null
}

let home: TestHome
const content = randomFillSync(Buffer.alloc(4 * mib))

beforeAll(async () => {
  home = await TestHome.create()
  await home.start()
  for (const name of ['default', 'other', 'third']) {
    if (name !== 'default') {
      home.cli('pool', 'create', name, '--driver', 'file', '--option', `path=${join(home.path, 'pools', name)}`)
    }
    // How full the disk of this machine is does not matter.
    home.cli('pool', 'set', name, 'low-space=off')
  }
  await writeFile(join(home.path, 'base.raw'), content)
})

afterAll(async () => {
  await home[Symbol.asyncDispose]()
})

/** A volume with 4 MiB that nothing shares, and a snapshot. */
function makeVolume(name: string): void {
  home.cli('image', 'import', name, join(home.path, 'base.raw'), '--format', 'raw')
  home.cli('volume', 'create', name, '--from', `image:${name}`)
  home.cli('image', 'delete', name)
  home.cli('snapshot', 'create', `${name}@s`)
}

const show = (name: string): Volume => home.json<Volume>('volume', 'show', name)

async function requireContent(name: string): Promise<void> {
  const client = await connect(home.cli('volume', 'attach', name, '--format', 'uri'))
  expect(content.equals(await client.read(0, content.length))).toBe(true)
  await client.disconnect()
  home.cli('volume', 'detach', name)
}

describe('atoll migrate', () => {
  test('says beforehand what it would copy, and with --dry-run changes nothing', () => {
    makeVolume('dry')
    const { plan, job } = home.json<Started>('migrate', 'dry', '--to', 'other', '--dry-run')
    expect(job).toBeNull()
    expect(plan.bytesToCopy + plan.bytesToOffload).toBe(content.length)
    expect(plan.bytesThere).toBe(0)
    expect(plan.resources.map(({ kind, name }) => `${kind} ${name}`).toSorted()).toEqual(['snapshot s', 'volume dry'])
    expect(home.cli('migrate', 'dry', '--to', 'other', '--dry-run')).toMatch(
      /^1 volume, 1 snapshot in \d+ layers: .* there already; .* free/,
    )
    expect(show('dry')).toMatchObject({ pool: 'default', readsFrom: [], move: null })
    expect(home.json<Job[]>('job', 'list').filter(({ kind }) => kind === 'migrate')).toEqual([])
  })

  test('moves a volume with its snapshots, prints the job, or with --wait how it went', async () => {
    makeVolume('both')
    const said = home.run('migrate', 'both', '--to', 'other', '--wait')
    expect(said, said.stderr).toMatchObject({ exitCode: 0 })
    expect(said.stdout).toMatch(/^moved to other: copied .*, freed .*; clients were held up for at most \d+ ms\n$/)
    expect(said.stderr).toContain('there already')
    expect(show('both')).toMatchObject({ pool: 'other', readsFrom: [], move: null })
    expect(home.json<{ pool: string }[]>('snapshot', 'list', 'both')).toMatchObject([{ pool: 'other' }])
    await requireContent('both')
    const [, id] = /^([0-9a-f-]{36})\n$/.exec(home.run('migrate', 'both', '--to', 'default').stdout) ?? []
    await expect.poll(() => home.json<Job>('job', 'show', id ?? '').state).toBe('done')
    expect(show('both').pool).toBe('default')
    await requireContent('both')
  })

  test('leaves the snapshots with --without-snapshots', async () => {
    makeVolume('alone')
    const { job } = home.json<Started>('migrate', 'alone', '--to', 'other', '--without-snapshots', '--wait')
    expect(job).toMatchObject({ state: 'done' })
    expect(show('alone')).toMatchObject({ pool: 'other', readsFrom: [] })
    expect(home.json<{ pool: string }[]>('snapshot', 'list', 'alone')).toMatchObject([{ pool: 'default' }])
    await requireContent('alone')
  })

  test('goes as slowly as it is told; the limit is changed while it runs; meanwhile the volume says so and is not deleted', async () => {
    makeVolume('slow')
    const { job } = home.json<Started>('migrate', 'slow', '--to', 'other', '--limit', '8K')
    const id = job?.id ?? ''
    expect(job?.params.limitBytesPerSecond).toBe(8192)
    expect(show('slow').move).toMatchObject({ jobId: id, to: 'other' })
    expect(home.cli('volume', 'show', 'slow')).toMatch(new RegExp(`^moving: +to other, .*${id}`, 'm'))
    expect(home.cli('volume', 'list')).toContain('slow')
    expect(home.failure('migrate', 'slow', '--to', 'third')).toMatchObject({
      code: 'MOVE_RUNNING',
      message: expect.stringContaining(id) as string,
    })
    expect(home.fail('volume', 'delete', 'slow', '--with-snapshots')).toBe('VOLUME_IN_USE')
    expect(home.fail('snapshot', 'rollback', 'slow@s')).toBe('VOLUME_IN_USE')
    expect(home.fail('pool', 'delete', 'other')).toBe('MOVE_RUNNING')
    expect(home.fail('pool', 'drain', 'other', '--to', 'third')).toBe('MOVE_RUNNING')
    await expect.poll(() => home.cli('job', 'show', id)).toMatch(/^details: +phase fill, copied /m)
    expect(home.cli('job', 'show', id)).toMatch(/^limit: +at most 8 KiB\/s$/m)
    expect(show('slow').readsFrom).not.toEqual([])
    expect(home.cli('job', 'pause', id)).toBe(`${id} paused`)
    expect(show('slow').move).toMatchObject({ state: 'paused' })
    expect(home.fail('job', 'limit', id, '10')).toBe('SIZE_INVALID')
    expect(home.cli('job', 'limit', id, '1M')).toBe(`${id} paused, at most 1 MiB/s`)
    expect(home.cli('job', 'limit', id, 'none')).toBe(`${id} paused, no limit`)
    home.cli('job', 'resume', id)
    await expect.poll(() => home.json<Job>('job', 'show', id).state).toBe('done')
    expect(home.fail('job', 'limit', id, 'none')).toBe('JOB_STATE')
    await requireContent('slow')
  })

  test('that is cancelled leaves nothing in the target but what was written since, and may be done again', async () => {
    makeVolume('cancelled')
    const before = home.json<Pool>('pool', 'show', 'third').storedBytes
    const { job } = home.json<Started>('migrate', 'cancelled', '--to', 'third', '--limit', '8K')
    await expect.poll(() => home.cli('job', 'show', job?.id ?? '')).toMatch(/phase fill/)
    expect(home.cli('job', 'cancel', job?.id ?? '')).toBe(`${job?.id} cancelled`)
    expect(show('cancelled')).toMatchObject({ pool: 'default', move: null })
    home.cli('pool', 'reclaim', 'third')
    expect(home.json<Pool>('pool', 'show', 'third').storedBytes).toBe(before)
    await requireContent('cancelled')
    expect(home.json<Started>('migrate', 'cancelled', '--to', 'third', '--wait').job).toMatchObject({ state: 'done' })
    await requireContent('cancelled')
    home.cli('volume', 'delete', 'cancelled', '--with-snapshots')
  })

  test('refuses what cannot be, and changes nothing', () => {
    makeVolume('refused')
    expect(home.fail('migrate', 'absent', '--to', 'other')).toBe('VOLUME_NOT_FOUND')
    expect(home.fail('migrate', 'refused', '--to', 'absent')).toBe('POOL_NOT_FOUND')
    expect(home.fail('migrate', 'refused', '--to', 'default')).toBe('MOVE_NEEDLESS')
    expect(home.fail('migrate', 'refused', '--to', 'other', '--limit', '1')).toBe('SIZE_INVALID')
    expect(home.fail('migrate', 'refused', '--to', 'other', '--limit', 'fast')).toBe('SIZE_INVALID')
    expect(home.run('migrate', 'refused')).toMatchObject({ exitCode: 2, stdout: '' })
    expect(home.run('migrate', '--to', 'other')).toMatchObject({ exitCode: 2, stdout: '' })
    expect(show('refused')).toMatchObject({ pool: 'default', move: null })
  })
})

describe('atoll pool drain', () => {
  test('moves everything out of a pool, which can be deleted then', async () => {
    home.cli('pool', 'create', 'old', '--driver', 'file', '--option', `path=${join(home.path, 'pools', 'old')}`)
    home.cli('image', 'import', 'golden', join(home.path, 'base.raw'), '--format', 'raw', '--pool', 'old')
    home.cli('volume', 'create', 'first', '--from', 'image:golden')
    home.cli('volume', 'create', 'second', '--from', 'image:golden')
    const { plan } = home.json<Started>('pool', 'drain', 'old', '--to', 'third', '--dry-run')
    expect(plan.bytesToCopy + plan.bytesToOffload).toBe(content.length)
    expect(plan.resources.map(({ name }) => name).toSorted()).toEqual(['first', 'golden', 'second'])
    const { job } = home.json<Started>('pool', 'drain', 'old', '--to', 'third', '--limit', '8K')
    expect(home.json<Pool>('pool', 'show', 'old').draining).toMatchObject({ jobId: job?.id, to: 'third' })
    expect(home.cli('pool', 'list')).toMatch(/^old +file +draining/m)
    expect(home.cli('pool', 'show', 'old')).toMatch(/^draining: +to third/m)
    expect(home.fail('pool', 'drain', 'old', '--to', 'other')).toBe('MOVE_RUNNING')
    expect(home.fail('migrate', 'refused', '--to', 'old')).toBe('POOL_DRAINING')
    expect(home.fail('pool', 'delete', 'third')).toBe('MOVE_RUNNING')
    home.cli('job', 'limit', job?.id ?? '', 'none')
    await expect.poll(() => home.json<Job>('job', 'show', job?.id ?? '').state).toBe('done')
    for (const volume of ['first', 'second']) {
      expect(show(volume)).toMatchObject({ pool: 'third', readsFrom: [] })
      await requireContent(volume)
    }
    expect(home.json<{ pool: string }>('image', 'show', 'golden').pool).toBe('third')
    home.cli('pool', 'reclaim', 'old')
    home.cli('pool', 'delete', 'old')
    expect(home.json<{ findings: unknown[] }>('check').findings).toEqual([])
  })

  test('refuses what cannot be', () => {
    expect(home.fail('pool', 'drain', 'absent', '--to', 'other')).toBe('POOL_NOT_FOUND')
    expect(home.fail('pool', 'drain', 'third', '--to', 'absent')).toBe('POOL_NOT_FOUND')
    expect(home.fail('pool', 'drain', 'third', '--to', 'third')).toBe('ARGUMENT_INVALID')
    expect(home.run('pool', 'drain', 'third')).toMatchObject({ exitCode: 2, stdout: '' })
  })
})
