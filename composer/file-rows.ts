/**
 * Rows of containers and files, and what a put or a delete makes of them.
 *
 * Rules:
 * - A name has at most one current file. A put makes another one current; what was current before goes, unless the container
 *   is versioned or that file was made while it was: then it stays as a version.
 * - A delete in a versioned container leaves a marker, a version without content; the versions stay. A delete of one version
 *   takes that away and makes no other one current. Both as in Swift's object versioning.
 * - Versions of a name are ordered by `created_at`, which is always later than that of the one before.
 * - Who changes what a name means holds the lock of the name (`fileKey`).
 */
import {
  assert,
  AtollError,
  currentFile,
  type CatalogTransaction,
  type ContainerCountsRow,
  type ContainerRow,
  type FileRow,
  type ResourceRow,
} from '@atoll/core'
import type { DropFile } from '@atoll/mapper'

/** A file and its content. */
export type FoundFile = FileRow & Pick<ResourceRow, 'size_bytes' | 'home_pool_id' | 'updated_at' | 'status'>

/** What a file is called and what is said about it. */
export interface FilePlace {
  readonly projectId: string
  readonly container: string
  readonly name: string
  readonly etag: string | null
  readonly contentType: string
  readonly metadata: Record<string, string>
  /** True: refused if there is such a file. */
  readonly onlyIfNew: boolean
  /** True: instead of a file, that there is none. */
  readonly deleteMarker: boolean
}

/** What rows of containers are made with. */
export interface RowSources {
  readonly nowMs: number
  readonly newId: () => string
}

/** The key under which what a name means is changed. */
export function fileKey(projectId: string, container: string, name: string): string {
  return `name:file:${projectId}:${container}/${name}`
}

/** For messages: what the row of a resource can hold of a file's name. */
export function resourceName(name: string): string {
  return Array.from(name).slice(0, 255).join('')
}

export async function findContainer(tx: CatalogTransaction, projectId: string, name: string): Promise<ContainerRow | undefined> {
  return await tx
    .selectFrom('containers')
    .selectAll()
    .where('project_id', '=', projectId)
    .where('name', '=', name)
    .executeTakeFirst()
}

/** @throws AtollError CONTAINER_NOT_FOUND */
export async function requireContainer(tx: CatalogTransaction, projectId: string, name: string): Promise<ContainerRow> {
  const container = await findContainer(tx, projectId, name)
  if (container !== undefined) return container
  throw containerNotFound(name)
}

export function containerNotFound(name: string): AtollError {
  return new AtollError('CONTAINER_NOT_FOUND', `there is no container ${JSON.stringify(name)}`, { values: { container: name } })
}

export async function insertContainer(
  tx: CatalogTransaction,
  container: Pick<ContainerRow, 'project_id' | 'name' | 'versioned' | 'metadata'>,
  { nowMs, newId }: RowSources,
): Promise<ContainerRow> {
  return await tx
    .insertInto('containers')
    .values({ id: newId(), ...container, created_at: nowMs, updated_at: nowMs })
    .returningAll()
    .executeTakeFirstOrThrow()
}

/** A container and what is in it. */
export type CountedContainer = ContainerRow & Omit<ContainerCountsRow, 'container_id'>

/** Containers with what is in them, of any project. */
export function selectContainers(tx: CatalogTransaction) {
  return tx
    .selectFrom('containers')
    .innerJoin('container_counts', 'container_counts.container_id', 'containers.id')
    .selectAll('containers')
    .select(['container_counts.file_count', 'container_counts.size_high', 'container_counts.size_low'])
}

/** Files with what their resources say, of any container. */
export function selectFiles(tx: CatalogTransaction) {
  return tx
    .selectFrom('files')
    .innerJoin('resources', 'resources.id', 'files.id')
    .selectAll('files')
    .select(['resources.size_bytes', 'resources.home_pool_id', 'resources.updated_at', 'resources.status'])
}

/** What a name means now. */
export async function findCurrent(tx: CatalogTransaction, containerId: string, name: string): Promise<FoundFile | undefined> {
  return await selectFiles(tx)
    .where('files.container_id', '=', containerId)
    .where('files.name', '=', name)
    .where(currentFile)
    .executeTakeFirst()
}

/**
 * One version of a name, or (undefined) the current one.
 * @throws AtollError FILE_NOT_FOUND
 */
export async function requireFile(
  tx: CatalogTransaction,
  container: Pick<ContainerRow, 'id' | 'name'>,
  name: string,
  version: string | undefined,
): Promise<FoundFile> {
  const found =
    version === undefined
      ? await findCurrent(tx, container.id, name)
      : await selectFiles(tx).where('files.id', '=', version.toLowerCase()).executeTakeFirst()
  if (found !== undefined && found.container_id === container.id && found.name === name) return found
  throw fileNotFound(container.name, name, version)
}

export function fileNotFound(container: string, name: string, version: string | undefined): AtollError {
  const what = JSON.stringify(`${container}/${name}`)
  return new AtollError(
    'FILE_NOT_FOUND',
    version === undefined ? `there is no file ${what}` : `${what} has no version ${version}`,
    {
      values: { container, name, ...(version === undefined ? {} : { version }) },
    },
  )
}

/**
 * Gives a file its place; a container that is not there is made. Inside a write, by who holds the lock of the name, and of the
 * file that is current.
 * @throws AtollError NAME_TAKEN
 */
export async function placeFile(
  tx: CatalogTransaction,
  place: FilePlace,
  file: ResourceRow,
  drop: DropFile,
  sources: RowSources,
): Promise<FoundFile> {
  const { projectId, name } = place
  const container =
    (await findContainer(tx, projectId, place.container)) ??
    (await insertContainer(tx, { project_id: projectId, name: place.container, versioned: false, metadata: {} }, sources))
  const current = await findCurrent(tx, container.id, name)
  if (current !== undefined) {
    if (place.onlyIfNew) {
      throw new AtollError('NAME_TAKEN', `there is already a file ${JSON.stringify(`${place.container}/${name}`)}`, {
        values: { id: current.id },
      })
    }
    await retire(tx, container, current, drop)
  }
  const last = await tx
    .selectFrom('files')
    .select('created_at')
    .where('container_id', '=', container.id)
    .where('name', '=', name)
    .orderBy('created_at', 'desc')
    .limit(1)
    .executeTakeFirst()
  const row = await tx
    .insertInto('files')
    .values({
      id: file.id,
      project_id: projectId,
      container_id: container.id,
      name,
      is_current: !place.deleteMarker,
      versioned: container.versioned,
      delete_marker: place.deleteMarker,
      etag: place.etag,
      content_type: place.contentType,
      metadata: place.metadata,
      created_at: Math.max(sources.nowMs, (last?.created_at ?? current?.created_at ?? 0) + 1),
    })
    .returningAll()
    .executeTakeFirstOrThrow()
  const { size_bytes, home_pool_id, updated_at, status } = file
  return { ...row, size_bytes, home_pool_id, updated_at, status }
}

/** What was current is a version, or goes. */
export async function retire(
  tx: CatalogTransaction,
  container: Pick<ContainerRow, 'versioned'>,
  current: FileRow,
  drop: DropFile,
): Promise<void> {
  if (!container.versioned && !current.versioned) {
    await drop(current.id)
    return
  }
  const result = await tx.updateTable('files').set({ is_current: false }).where('id', '=', current.id).executeTakeFirst()
  assert(result.numUpdatedRows === 1n, `file ${current.id} lost its row`)
}
