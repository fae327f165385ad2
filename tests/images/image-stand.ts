// A composer with everything behind it, in a folder of its own, for tests that bring images in and out.
import assert from 'node:assert/strict'
import { execFile } from 'node:child_process'
import { chmod, mkdir, mkdtemp, readdir, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { openComposer, type Composer, type ComposerOptions } from '@atoll/composer'
import { openCatalog, silentLog, type Catalog } from '@atoll/core'
import { openMapper, type Mapper } from '@atoll/mapper'
import { Engine } from '@atoll/native'
import { serveTemporaryNbd } from '@atoll/northbound'
import { drivers } from '@atoll/southbound'
import { vi } from 'vitest'

export const run = promisify(execFile)
export const mebibyte = 2 ** 20

export class ImageStand {
  readonly folder: string
  catalog!: Catalog
  engine!: Engine
  mapper!: Mapper
  composer!: Composer
  private readonly options: Partial<ComposerOptions>

  private constructor(folder: string, options: Partial<ComposerOptions>) {
    this.folder = folder
    this.options = options
  }

  static async open(options: Partial<ComposerOptions> = {}): Promise<ImageStand> {
    const folder = await mkdtemp(join(tmpdir(), 'atoll-images-'))
    // The confined user passes through here.
    await chmod(folder, 0o711)
    await mkdir(join(folder, 'tmp'))
    await chmod(join(folder, 'tmp'), 0o711)
    vi.stubEnv('TMPDIR', join(folder, 'tmp'))
    const stand = new ImageStand(folder, options)
    await stand.start()
    return stand
  }

  async start(): Promise<void> {
    const log = silentLog()
    const { folder } = this
    this.catalog = await openCatalog(join(folder, 'catalog.db'), { reserveBytes: 0 })
    this.engine = new Engine()
    this.mapper = await openMapper({ catalog: this.catalog, engine: this.engine, drivers, log })
    this.composer = await openComposer({
      catalog: this.catalog,
      engine: this.engine,
      mapper: this.mapper,
      log,
      home: folder,
      serveTemporaryNbd: (exports, options) => serveTemporaryNbd(this.engine, exports, options),
      ...this.options,
    })
    await this.composer.pools.createFirst({ name: 'default', driver: 'file', options: { path: join(folder, 'pool') } })
  }

  async stop(): Promise<void> {
    await this.composer.close()
    await this.mapper.close()
    await this.engine.close()
    await this.catalog.close()
  }

  async remove(): Promise<void> {
    vi.unstubAllEnvs()
    await this.stop()
    await rm(this.folder, { recursive: true, force: true })
  }

  path(name: string): string {
    return join(this.folder, name)
  }

  /** The image as a raw file, in memory. */
  async exported(image: string): Promise<Buffer> {
    const path = this.path(`${image}.exported`)
    const job = await this.composer.images.export(image, { path })
    const { state, error } = await this.composer.jobs.wait(job.id)
    assert.deepEqual({ state, error }, { state: 'done', error: null })
    const bytes = await readFile(path)
    await rm(path)
    return bytes
  }

  /** What is left of imports, once reclaim has run: compare with `nothingLeft`. */
  async left(): Promise<Left> {
    const images = (await this.composer.images.list()).entries.map(({ name }) => name)
    const spool = await readdir(join(this.folder, 'spool')).catch(() => [])
    const sandboxes = await readdir(join(this.folder, 'tmp'))
    const job = await this.composer.pools.reclaim('default')
    await this.composer.jobs.wait(job.id)
    const { storedBytes } = await this.composer.pools.show('default')
    return { images, spool, sandboxes, storedBytes }
  }
}

interface Left {
  images: string[]
  spool: string[]
  sandboxes: string[]
  storedBytes: number
}

export const nothingLeft: Left = { images: [], spool: [], sandboxes: [], storedBytes: 0 }
