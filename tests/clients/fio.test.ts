/** fio's NBD engine against the real daemon: what it wrote is verified by fio itself, at once, later, and on clones. */
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { hasPrograms } from '../cli/test-programs.ts'
import { ClientStand } from './client-stand.ts'
import { runClient } from './run-client.ts'

const jobs = 4
/** What each of the jobs writes: sixteen megabytes of its own. */
const areas = ['--size=16M', '--offset_increment=16M', `--numjobs=${jobs}`]

describe.skipIf(!hasPrograms('fio'))('fio (package fio)', () => {
  let stand: ClientStand
  let folder: string
  beforeAll(async () => {
    stand = await ClientStand.create()
    folder = await mkdtemp(join(tmpdir(), 'atoll-fio-'))
  })
  afterAll(async () => {
    await stand?.[Symbol.asyncDispose]()
    if (folder !== undefined) await rm(folder, { recursive: true, force: true })
  })

  interface JobReport {
    readonly error: number
    readonly write: { readonly io_bytes: number }
    readonly read: { readonly io_bytes: number }
  }

  /** Runs four jobs at depth 32, each on a quarter of the export; fails when one of them found an error. */
  async function fio(uri: string, ...options: string[]): Promise<{ writtenBytes: number; readBytes: number }> {
    const reportPath = join(folder, 'report.json')
    const job = ['--name=verify', '--ioengine=nbd', `--uri=${uri}`, '--iodepth=32', ...areas]
    const verification = ['--verify=crc32c', '--verify_fatal=1', '--verify_state_save=0']
    await runClient('fio', ...job, ...verification, '--output-format=json', `--output=${reportPath}`, ...options)
    const report = JSON.parse(await readFile(reportPath, 'utf8')) as { jobs: JobReport[] }
    expect(report.jobs).toHaveLength(jobs)
    let [writtenBytes, readBytes] = [0, 0]
    for (const job of report.jobs) {
      expect(job.error).toBe(0)
      writtenBytes += job.write.io_bytes
      readBytes += job.read.io_bytes
    }
    return { writtenBytes, readBytes }
  }

  test('verifies random writes of mixed sizes on a clone, four jobs at depth 32', async () => {
    const uri = stand.clone('mixed')
    const { writtenBytes, readBytes } = await fio(uri, '--rw=randwrite', '--bsrange=4k-128k', '--fsync=64', '--do_verify=1')
    expect(writtenBytes).toBe(64 * 1024 * 1024)
    expect(readBytes).toBe(writtenBytes)
  })

  test('verifies requests that are aligned to 512 bytes only', async () => {
    const uri = stand.clone('small')
    const { readBytes } = await fio(
      uri,
      '--rw=randwrite',
      '--bsrange=512-9k',
      '--blockalign=512',
      '--io_size=3M',
      '--do_verify=1',
    )
    expect(readBytes).toBeGreaterThan(jobs * 2 * 1024 * 1024)
  })

  test('verifies reads among the writes while snapshots are taken', async () => {
    const uri = stand.clone('busy')
    let running = true
    const load = fio(uri, '--rw=randrw', '--bs=4k', '--verify_backlog=128', '--do_verify=1').finally(() => (running = false))
    let taken = 0
    while (running && taken < 20) {
      await stand.home.snapshotMeanwhile(`busy@s${taken}`)
      taken++
    }
    expect((await load).writtenBytes).toBeGreaterThan(16 * 1024 * 1024)
    expect(taken).toBeGreaterThan(0)
  })

  test('finds its data again after kill -9, and on the clone of a snapshot after the volume was overwritten', async () => {
    const uri = stand.clone('kept')
    const first = ['--rw=randwrite', '--bs=4k-64k', '--verify_pattern=0x12345678%o', '--verify=pattern', '--randseed=1']
    const second = ['--rw=randwrite', '--bs=4k-64k', '--verify_pattern=0x87654321%o', '--verify=pattern', '--randseed=2']
    await fio(uri, ...first, '--do_verify=0', '--end_fsync=1')
    await stand.crash()
    await fio(uri, ...first, '--verify_only=1')
    stand.home.cli('snapshot', 'create', 'kept@first')
    await fio(uri, ...second, '--do_verify=1', '--end_fsync=1')
    stand.home.cli('volume', 'create', 'kept-past', '--from', 'snapshot:kept@first')
    await fio(stand.attach('kept-past'), ...first, '--verify_only=1')
    await fio(uri, ...second, '--verify_only=1')
    // The check itself: the wrong pattern is found.
    await expect(fio(uri, ...first, '--verify_only=1')).rejects.toThrowError(/verify|bad/i)
  })
})
