import type { Command } from 'commander'
import type { SnapshotDocument, VolumeDocument } from '../admin-types.ts'
import { segment } from '../client/admin-client.ts'
import { allPages } from '../client/all-pages.ts'
import { formatBytes } from '../terminal/format-bytes.ts'
import { formatTable } from '../terminal/table.ts'
import { contextOf, withExample } from './command-context.ts'

interface DiffExtent {
  readonly offsetBytes: number
  readonly lengthBytes: number
  readonly kind: 'data' | 'zero'
}

export function register(snapshot: Command): void {
  withExample(
    snapshot
      .command('create')
      .description('take a snapshot; several volumes named at once get theirs at one point in time')
      .argument('<vol@snap...>')
      .action(async (names: string[], _options: unknown, command: Command) => {
        const context = contextOf(command)
        const body = { snapshots: names, project: context.project }
        const document = await context.client.post<{ snapshots: SnapshotDocument[]; pauseMs: number }>('/v1/snapshots', body)
        context.print(document, () => document.snapshots.map((taken) => taken.id).join('\n'))
      }),
    'atoll snapshot create root@before-upgrade data@before-upgrade',
  )
  withExample(
    snapshot
      .command('list')
      .description('show the snapshots of a volume')
      .argument('<volume>', 'name or id')
      .action(async (volume: string, _options: unknown, command: Command) => {
        const context = contextOf(command)
        const query = { project: context.project, volume }
        const documents = await allPages<SnapshotDocument>(context.client, '/v1/snapshots', query)
        context.print(documents, () =>
          formatTable(
            ['name', 'size', 'status', 'created', 'id'],
            documents.map((document) => [
              document.name,
              formatBytes(document.sizeBytes),
              document.status,
              document.createdAt,
              document.id,
            ]),
          ),
        )
      }),
    'atoll snapshot list root',
  )
  withExample(
    snapshot
      .command('delete')
      .description('delete a snapshot; clones made from it keep their data')
      .argument('<vol@snap>')
      .action(async (name: string, _options: unknown, command: Command) => {
        const context = contextOf(command)
        const query = { project: context.project }
        context.print(await context.client.delete(`/v1/snapshots/${segment(name)}`, query), () => `deleted ${name}`)
      }),
    'atoll snapshot delete root@before-upgrade',
  )
  withExample(
    snapshot
      .command('rollback')
      .description('bring a volume that is not attached back to a snapshot; what was written since is lost')
      .argument('<vol@snap>')
      .action(async (name: string, _options: unknown, command: Command) => {
        const context = contextOf(command)
        const body = { project: context.project }
        const document = await context.client.post<VolumeDocument>(`/v1/snapshots/${segment(name)}/rollback`, body)
        context.print(document, () => `${document.name} is as it was at ${name}`)
      }),
    'atoll snapshot rollback root@before-upgrade',
  )
  withExample(
    snapshot
      .command('diff')
      .description('show which ranges differ between a snapshot and a later one, or the volume as it is now')
      .argument('<vol@a>')
      .argument('[to]', 'VOL@B or VOL (default: the volume of the first)')
      .action(async (from: string, to: string | undefined, _options: unknown, command: Command) => {
        const context = contextOf(command)
        const query = { project: context.project, from, to }
        const extents = await context.client.get<DiffExtent[]>('/v1/diff', query)
        context.print(extents, () =>
          formatTable(
            ['offset', 'length', 'kind'],
            extents.map((extent) => [extent.offsetBytes, extent.lengthBytes, extent.kind]),
          ),
        )
      }),
    'atoll snapshot diff root@monday root@tuesday',
    'atoll snapshot diff root@monday root',
  )
}
