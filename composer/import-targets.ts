/**
 * The images that imports write. The mapper keeps the target of an import open between the steps of a job, over a pause too;
 * after a restart it is opened again. An image that no unfinished job writes is removed: nobody would ever finish it.
 */
import { volumeSizeMaxBytes, type Catalog, type Logger, type ResourceRow } from '@atoll/core'
import type { ImportTarget, Mapper } from '@atoll/mapper'

export class ImportTargets {
  private readonly mapper: Mapper
  private readonly catalog: Catalog
  private readonly open = new Map<string, ImportTarget>()

  constructor(options: { mapper: Mapper; catalog: Catalog }) {
    this.mapper = options.mapper
    this.catalog = options.catalog
  }

  /** Makes the image with status `creating`. `sizeBytes` null: `finish` tells. */
  async begin(image: { projectId: string; name: string; sizeBytes: number | null; poolId: string }): Promise<string> {
    const target = await this.mapper.beginImport({ ...image, sizeBytes: image.sizeBytes ?? volumeSizeMaxBytes, kind: 'image' })
    this.open.set(target.resourceId, target)
    return target.resourceId
  }

  /** The target of an import that is under way; null if the image is finished already. */
  async get(imageId: string): Promise<ImportTarget | null> {
    const open = this.open.get(imageId)
    if (open !== undefined) return open
    if ((await this.find(imageId))?.status === 'available') return null
    const target = await this.mapper.resumeImport(imageId)
    this.open.set(imageId, target)
    return target
  }

  /** Makes the image available: everything written is durable. `sizeBytes`: its size, if it was not known at the beginning. */
  async finish(imageId: string, sizeBytes?: number): Promise<void> {
    await this.mapper.finishImport(imageId, sizeBytes === undefined ? {} : { sizeBytes })
    this.open.delete(imageId)
  }

  /** Removes an image that is not finished; one that is finished, or gone, stays as it is. */
  async abort(imageId: string): Promise<void> {
    const row = await this.find(imageId)
    if (row !== undefined && row.status !== 'available') await this.mapper.abortImport(imageId)
    this.open.delete(imageId)
  }

  /** Removes the images that no job works on: what a crash between the image and its job left behind. */
  async removeOrphans(subjects: ReadonlySet<string> | ReadonlyMap<string, string>, log: Logger): Promise<void> {
    const rows = await this.catalog.db
      .selectFrom('resources')
      .selectAll()
      .where('kind', '=', 'image')
      .where('status', '!=', 'available')
      .execute()
    for (const row of rows) {
      if (subjects.has(row.id)) continue
      try {
        await this.mapper.abortImport(row.id)
        log.warn({ imageId: row.id, name: row.name }, 'an import that nobody works on was removed')
      } catch (error) {
        log.error({ err: error, imageId: row.id, name: row.name }, 'an import that nobody works on could not be removed')
      }
    }
  }

  private async find(imageId: string): Promise<ResourceRow | undefined> {
    return await this.catalog.db.selectFrom('resources').selectAll().where('id', '=', imageId).executeTakeFirst()
  }
}
