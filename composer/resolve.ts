/**
 * From what a user types (a name, an id, `VOLUME@SNAPSHOT`, `snapshot:VOLUME@SNAPSHOT`) to rows of the catalog. Names need
 * not be unique: one that matches several is refused with their ids, never guessed.
 */
import {
  adminProject,
  AtollError,
  isId as isExactId,
  parseFilePath,
  parseSnapshotName,
  type Catalog,
  type ErrorCode,
  type PoolRow,
  type ProjectRow,
  type ResourceKind,
  type ResourceRow,
} from '@atoll/core'
import { fileNotFound, requireContainer, requireFile } from './file-rows.ts'

/** Whose names are meant; `project` is a name or an id, default `admin`. */
export interface ProjectScope {
  project?: string
}

/** At most this many ids are named when a name is ambiguous. */
const ambiguousIdsShownMax = 10

const notFoundCodes = {
  volume: 'VOLUME_NOT_FOUND',
  snapshot: 'SNAPSHOT_NOT_FOUND',
  image: 'IMAGE_NOT_FOUND',
  file: 'FILE_NOT_FOUND',
} as const satisfies Record<ResourceKind, ErrorCode>

export class Resolver {
  private readonly catalog: Catalog

  constructor(catalog: Catalog) {
    this.catalog = catalog
  }

  /** @throws AtollError PROJECT_NOT_FOUND, NAME_AMBIGUOUS */
  async project(scope: ProjectScope): Promise<ProjectRow> {
    const nameOrId = scope.project ?? adminProject.id
    const byId = isId(nameOrId)
    const query = this.catalog.db.selectFrom('projects').selectAll()
    const rows = await (byId ? query.where('id', '=', nameOrId.toLowerCase()) : query.where('name', '=', nameOrId)).execute()
    return onlyOne('project', nameOrId, rows, 'PROJECT_NOT_FOUND')
  }

  /**
   * A volume or image by name or id within the project. A snapshot by id or `VOLUME@SNAPSHOT`.
   * @throws AtollError VOLUME_NOT_FOUND, SNAPSHOT_NOT_FOUND, IMAGE_NOT_FOUND, NAME_AMBIGUOUS, PROJECT_NOT_FOUND
   */
  async resource(kind: ResourceKind, nameOrId: string, scope: ProjectScope = {}): Promise<ResourceRow> {
    if (kind === 'snapshot' && !isId(nameOrId)) {
      const { volume, snapshot } = parseSnapshotName(nameOrId)
      return await this.snapshot(volume, snapshot, scope)
    }
    const project = await this.project(scope)
    const query = this.catalog.db
      .selectFrom('resources')
      .selectAll()
      .where('project_id', '=', project.id)
      .where('kind', '=', kind)
    const rows = await (
      isId(nameOrId) ? query.where('id', '=', nameOrId.toLowerCase()) : query.where('name', '=', nameOrId)
    ).execute()
    return onlyOne(kind, nameOrId, rows, notFoundCodes[kind])
  }

  /** A snapshot of a volume, each by name or id. @throws as `resource`, SNAPSHOT_MISMATCH */
  async snapshot(volumeNameOrId: string, nameOrId: string, scope: ProjectScope = {}): Promise<ResourceRow> {
    const volume = await this.resource('volume', volumeNameOrId, scope)
    if (isId(nameOrId)) {
      const row = await this.resource('snapshot', nameOrId, scope)
      if (row.volume_id !== volume.id) {
        throw new AtollError('SNAPSHOT_MISMATCH', `snapshot ${nameOrId} does not belong to volume ${volumeNameOrId}`, {
          values: { snapshot: nameOrId, volume: volumeNameOrId },
        })
      }
      return row
    }
    const rows = await this.catalog.db
      .selectFrom('resources')
      .selectAll()
      .where('kind', '=', 'snapshot')
      .where('volume_id', '=', volume.id)
      .where('name', '=', nameOrId)
      .execute()
    return onlyOne('snapshot', `${volumeNameOrId}@${nameOrId}`, rows, 'SNAPSHOT_NOT_FOUND')
  }

  /**
   * What anything can be made from: `image:NAME`, `snapshot:VOLUME@SNAPSHOT`, `volume:NAME`, `file:CONTAINER/NAME`, or an id of
   * any of them.
   * @throws AtollError ARGUMENT_INVALID for another form, else as `resource`
   */
  async source(text: string, scope: ProjectScope = {}): Promise<ResourceRow> {
    if (isId(text)) return await this.anyResource(text, scope)
    const separator = text.indexOf(':')
    const kind = text.slice(0, Math.max(separator, 0))
    if (kind === 'file') return await this.file(text.slice(separator + 1), scope)
    if (kind !== 'image' && kind !== 'snapshot' && kind !== 'volume') {
      throw new AtollError(
        'ARGUMENT_INVALID',
        `${JSON.stringify(text)} is not a source: use image:NAME, snapshot:VOLUME@SNAPSHOT, volume:NAME or file:CONTAINER/NAME`,
        {
          values: { source: text },
        },
      )
    }
    return await this.resource(kind, text.slice(separator + 1), scope)
  }

  /** What CONTAINER/NAME means now, or a file by its id. @throws AtollError FILE_NOT_FOUND, CONTAINER_NOT_FOUND, NAME_INVALID */
  async file(path: string, scope: ProjectScope = {}): Promise<ResourceRow> {
    if (isId(path)) return await this.resource('file', path, scope)
    const names = parseFilePath(path)
    const project = await this.project(scope)
    const container = await requireContainer(this.catalog.db, project.id, names.container)
    const { id } = await requireFile(this.catalog.db, container, names.name, undefined)
    const row = await this.catalog.db.selectFrom('resources').selectAll().where('id', '=', id).executeTakeFirst()
    if (row === undefined) throw fileNotFound(names.container, names.name, undefined)
    return row
  }

  /** A volume by name, or any resource by its id. @throws AtollError VOLUME_NOT_FOUND, RESOURCE_NOT_FOUND, NAME_AMBIGUOUS */
  async volumeOrId(nameOrId: string, scope: ProjectScope = {}): Promise<ResourceRow> {
    return isId(nameOrId) ? await this.anyResource(nameOrId, scope) : await this.resource('volume', nameOrId, scope)
  }

  /** A volume, snapshot or image by its id. @throws AtollError RESOURCE_NOT_FOUND */
  async anyResource(id: string, scope: ProjectScope = {}): Promise<ResourceRow> {
    const project = await this.project(scope)
    const rows = await this.catalog.db
      .selectFrom('resources')
      .selectAll()
      .where('project_id', '=', project.id)
      .where('id', '=', id.toLowerCase())
      .execute()
    return onlyOne('resource', id, rows, 'RESOURCE_NOT_FOUND')
  }

  /** A pool by name or id; pools are seen by every project. @throws AtollError POOL_NOT_FOUND, NAME_AMBIGUOUS */
  async pool(nameOrId: string): Promise<PoolRow> {
    const query = this.catalog.db.selectFrom('pools').selectAll()
    const rows = await (
      isId(nameOrId) ? query.where('id', '=', nameOrId.toLowerCase()) : query.where('name', '=', nameOrId)
    ).execute()
    return onlyOne('pool', nameOrId, rows, 'POOL_NOT_FOUND')
  }
}

/** Ids are taken in any case. */
function isId(text: string): boolean {
  return isExactId(text.toLowerCase())
}

function onlyOne<T extends { id: string }>(kind: string, nameOrId: string, rows: readonly T[], notFoundCode: ErrorCode): T {
  const row = rows[0]
  if (row === undefined) {
    throw new AtollError(notFoundCode, `there is no ${kind} ${JSON.stringify(nameOrId)}`, { values: { [kind]: nameOrId } })
  }
  if (rows.length > 1) {
    const ids = rows.slice(0, ambiguousIdsShownMax).map(({ id }) => id)
    throw new AtollError(
      'NAME_AMBIGUOUS',
      `${rows.length} ${kind}s are named ${JSON.stringify(nameOrId)}; use one of the ids ${ids.join(', ')}`,
      {
        values: { name: nameOrId, ids },
      },
    )
  }
  return row
}

/** What `attach` takes: a volume, or with a prefix or an `@` something to read. @throws as `Resolver.source` and `resource` */
export async function attachableResource(resolver: Resolver, text: string, scope: ProjectScope): Promise<ResourceRow> {
  if (/^(image|snapshot|volume):/.test(text)) return await resolver.source(text, scope)
  if (text.includes('@')) return await resolver.resource('snapshot', text, scope)
  return await resolver.volumeOrId(text, scope)
}
