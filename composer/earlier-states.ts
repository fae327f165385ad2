/**
 * The snapshots that an export can be compared with: those of the volume, and for a snapshot the others of its volume.
 * Names of snapshots need not be unique: one that several have stands for none of them, and their ids are listed instead.
 */
import { isAtollError, type Catalog, type ResourceRow } from '@atoll/core'
import type { Mapper } from '@atoll/mapper'
import type { FrozenMap } from '@atoll/native'
import { snapshotsOf } from './service-context.ts'

export class EarlierStates {
  readonly #catalog: Catalog
  readonly #mapper: Pick<Mapper, 'snapshotMap'>
  readonly #resource: Pick<ResourceRow, 'id' | 'kind' | 'volume_id'>

  constructor(catalog: Catalog, mapper: Pick<Mapper, 'snapshotMap'>, resource: Pick<ResourceRow, 'id' | 'kind' | 'volume_id'>) {
    this.#catalog = catalog
    this.#mapper = mapper
    this.#resource = resource
  }

  /** Names, or ids where a name is not enough. */
  async list(): Promise<string[]> {
    const rows = await this.#rows()
    return rows.map((row) => (rows.some((other) => other !== row && other.name === row.name) ? row.id : row.name))
  }

  /**
   * The map of a snapshot by name or id; it stays whole when the snapshot is deleted. Null if there is none, or several.
   * @throws AtollError PAGE_MISSING, PAGE_CORRUPT
   */
  async open(name: string): Promise<FrozenMap | null> {
    const rows = await this.#rows()
    const named = rows.filter((row) => row.name === name)
    const found = rows.find((row) => row.id === name) ?? (named.length === 1 ? named[0] : undefined)
    if (found === undefined) return null
    try {
      return await this.#mapper.snapshotMap(found.id)
    } catch (error) {
      // Deleted meanwhile, or on its way.
      if (isAtollError(error, 'SNAPSHOT_NOT_FOUND') || isAtollError(error, 'RESOURCE_STATUS')) return null
      throw error
    }
  }

  async #rows(): Promise<ResourceRow[]> {
    const { id, kind, volume_id: volumeOfSnapshot } = this.#resource
    const volumeId = kind === 'volume' ? id : volumeOfSnapshot
    if (volumeId === null) return []
    return (await snapshotsOf(this.#catalog, volumeId)).filter((row) => row.id !== id && row.status === 'available')
  }
}
