/** The catalog as a whole: backups of it. Restoring one is done without a daemon. */
import type { BackupInfo, Catalog } from '@atoll/core'
import { fromFileError } from './from-file-error.ts'

export class CatalogService {
  private readonly catalog: Catalog

  constructor(catalog: Catalog) {
    this.catalog = catalog
  }

  /**
   * Writes a backup to a new file at an absolute path; everything goes on meanwhile.
   * @throws AtollError DESTINATION_INVALID, DESTINATION_EXISTS, NO_SPACE, CATALOG_CORRUPT
   */
  async backup(path: string): Promise<BackupInfo> {
    try {
      return await this.catalog.backup(path)
    } catch (error) {
      throw fromFileError(error)
    }
  }
}
