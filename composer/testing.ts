/** What tests need to have a composer over a real mapper and engine. Not a part of the package's face. */
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { basename, join } from 'node:path'
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'
import { AtollError, openCatalog, silentLog, systemClock, type Catalog } from '@atoll/core'
import { openMapper, type Mapper } from '@atoll/mapper'
import { Engine, type Device } from '@atoll/native'
import { drivers, memoryDriver, withFaults, type Driver } from '@atoll/southbound'
import { openComposer, type Composer, type ComposerOptions } from './composer.ts'
import type { ExportConnection, ExportEntry } from './exports.ts'
import type { SetTimer } from './timers.ts'

export const mebibyte = 2 ** 20

/** Everything that one daemon has open, over one folder. */
export class TestDaemon {
  readonly catalog: Catalog
  readonly engine: Engine
  readonly mapper: Mapper
  readonly composer: Composer

  private constructor(parts: { catalog: Catalog; engine: Engine; mapper: Mapper; composer: Composer }) {
    this.catalog = parts.catalog
    this.engine = parts.engine
    this.mapper = parts.mapper
    this.composer = parts.composer
  }

  /** Opens what is in `folder`; the first time it makes the file pool `default` there. */
  static async open(
    folder: string,
    options: Partial<ComposerOptions> & { drivers?: readonly Driver[] } = {},
  ): Promise<TestDaemon> {
    const catalog = await openCatalog(join(folder, 'catalog.db'), { reserveBytes: 0 })
    const engine = new Engine()
    const log = silentLog()
    const mapper = await openMapper({
      catalog,
      engine,
      drivers: options.drivers ?? [...drivers, withFaults(memoryDriver)],
      log,
      ...(options.clock === undefined ? {} : { clock: options.clock }),
    })
    const composer = await openComposer({
      catalog,
      engine,
      mapper,
      log,
      home: folder,
      serveTemporaryNbd: noTemporaryNbd,
      copyStepBytes: testStepBytes,
      ...options,
    })
    // How full the disk of this machine is does not matter.
    const settings = { 'low-space': 'off' }
    await composer.pools.createFirst({ name: 'default', ...defaultPoolOf(folder), settings })
    return new TestDaemon({ catalog, engine, mapper, composer })
  }

  /** A clean stop. */
  async stop(): Promise<void> {
    await this.composer.close()
    await this.mapper.close()
    await this.engine.close()
    await this.catalog.close()
  }
}

/** A folder of files; where the conf of a Ceph cluster is given (tests/ceph/suites-over-ceph.test.ts), a namespace there. */
function defaultPoolOf(folder: string): { driver: string; options: Record<string, string> } {
  const conf = process.env['ATOLL_TEST_CEPH_CONF']
  if (conf === undefined) return { driver: 'file', options: { path: join(folder, 'pool') } }
  const namespace = basename(folder)
  return { driver: 'ceph', options: { conf, pool: 'atoll', namespace, timeout: '600', 'connect-timeout': '300' } }
}

/** Steps of jobs in tests: small, so that files are. */
export const testStepBytes = 4 * mebibyte

/**
 * Runs a scenario of testing-child.ts over `folder` in a process of its own, and kills that (SIGKILL) when it says that it is
 * where it should be. Resolves with what it said.
 */
export async function killAtScenario(folder: string, scenario: string, ...parameters: string[]): Promise<string> {
  const program = fileURLToPath(new URL('testing-child.ts', import.meta.url))
  const child = spawn(process.execPath, [program, folder, scenario, ...parameters], { stdio: ['ignore', 'pipe', 'inherit'] })
  const exited = once(child, 'exit')
  for await (const line of createInterface({ input: child.stdout })) {
    child.kill('SIGKILL')
    await exited
    return line
  }
  throw new Error(`the scenario ${scenario} ended by itself`)
}

/** A new folder, removed by `remove`. */
export async function makeFolder(): Promise<{ folder: string; remove: () => Promise<void> }> {
  const folder = await mkdtemp(join(tmpdir(), 'atoll-composer-'))
  return { folder, remove: () => rm(folder, { recursive: true, force: true }) }
}

/** A client of an export as northbound would have it. */
export class TestClient implements ExportConnection {
  readonly peer = 'test'
  readonly device: Device
  closed = false
  drained = false
  private readonly composer: Composer
  private readonly entry: ExportEntry

  constructor(composer: Composer, exportName: string) {
    const entry = composer.exports.get(exportName)
    if (entry === null) throw new AtollError('EXPORT_GONE', `no export ${exportName}`)
    this.composer = composer
    this.entry = entry
    composer.exports.enter(entry, this)
    this.device = entry.device
  }

  async drain(): Promise<void> {
    this.drained = true
    await this.close()
  }

  async close(): Promise<void> {
    if (this.closed) return
    this.closed = true
    this.composer.exports.leave(this.entry, this)
  }
}

/** Timers that are due when the test says so. */
export class ManualTimers {
  private pending = new Set<() => void>()

  readonly setTimer: SetTimer = (callback) => {
    const once = (): void => {
      this.pending.delete(once)
      callback()
    }
    this.pending.add(once)
    return () => void this.pending.delete(once)
  }

  /** Everything that waits is due now. */
  expireAll(): void {
    // What they set in turn is not due yet.
    const due = Array.from(this.pending)
    for (const callback of due) callback()
  }
}

/** Waits until `condition` holds; fails after five minutes, which no machine takes that only is busy. */
export async function until(condition: () => boolean | Promise<boolean>): Promise<void> {
  const deadlineMs = systemClock.monotonicMs() + 300_000
  while (!(await condition())) {
    if (systemClock.monotonicMs() > deadlineMs) throw new Error('the condition did not come true in time')
    await new Promise((resolve) => setImmediate(resolve))
  }
}

function noTemporaryNbd(): never {
  throw new AtollError('INTERNAL', 'this test serves no temporary exports')
}
