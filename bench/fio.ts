/** fio over NBD, or over a library of its own engines: one job, one connection, no file system in between. */
import { execFile } from 'node:child_process'
import { promisify } from 'node:util'

export interface FioJob {
  readonly rw: 'read' | 'write' | 'randread' | 'randwrite'
  readonly blockBytes: number
  readonly depth: number
  /** Part of the disk that is used, from its start. */
  readonly sizeBytes: number
  /** For so long; absent: until every block of `sizeBytes` was used once. */
  readonly runtimeSeconds?: number
  /** Ends after so many bytes; absent: `sizeBytes`. */
  readonly bytesMax?: number
  /** A flush after this many writes; absent: none. */
  readonly writesPerFlush?: number
  readonly seed: number
}

/** What a job drives: the URI of an NBD disk, or another engine of fio with its options. */
export type FioTarget = string | { readonly engine: readonly string[]; readonly environment: Readonly<Record<string, string>> }

export interface FioResult {
  readonly operationsPerSecond: number
  readonly bytesPerSecond: number
  /** Median of the time from submission to completion. */
  readonly latencyMicroseconds: number
}

interface FioDocument {
  readonly jobs: readonly {
    readonly error: number
    readonly read: FioSide
    readonly write: FioSide
  }[]
}

interface FioSide {
  readonly iops: number
  readonly bw_bytes: number
  readonly total_ios: number
  readonly clat_ns: { readonly percentile?: Readonly<Record<string, number>> }
}

const run = promisify(execFile)

/** @throws Error with what fio said, or if it did nothing */
export async function runFio(target: FioTarget, job: FioJob): Promise<FioResult> {
  const args = [
    '--name=bench',
    ...(typeof target === 'string' ? ['--ioengine=nbd', `--uri=${target}`] : target.engine),
    `--rw=${job.rw}`,
    `--bs=${job.blockBytes}`,
    `--iodepth=${job.depth}`,
    `--size=${job.sizeBytes}`,
    `--randseed=${job.seed}`,
    '--norandommap=0',
    // Content that no layer below could compress or drop, made once.
    '--refill_buffers=0',
    '--output-format=json',
    ...(job.runtimeSeconds === undefined ? [] : ['--time_based=1', `--runtime=${job.runtimeSeconds}`]),
    ...(job.bytesMax === undefined ? [] : [`--io_size=${job.bytesMax}`]),
    ...(job.writesPerFlush === undefined ? [] : [`--fsync=${job.writesPerFlush}`]),
  ]
  const env = typeof target === 'string' ? process.env : { ...process.env, ...target.environment }
  const { stdout } = await run('fio', args, { env, maxBuffer: 16 * 2 ** 20 })
  // fio writes warnings before the document.
  const document = JSON.parse(stdout.slice(stdout.indexOf('{'))) as FioDocument
  const done = document.jobs[0]
  const side = job.rw.includes('read') ? done?.read : done?.write
  if (done === undefined || side === undefined || done.error !== 0 || side.total_ios === 0)
    throw new Error(`fio ${args.join(' ')} did nothing: ${stdout.slice(0, 500)}`)
  return {
    operationsPerSecond: side.iops,
    bytesPerSecond: side.bw_bytes,
    latencyMicroseconds: (side.clat_ns.percentile?.['50.000000'] ?? 0) / 1000,
  }
}
