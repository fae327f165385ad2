import { Option } from 'commander'
import type { Command } from 'commander'
import type { AttachmentDocument, CreatedVolumeDocument, VolumeDocument, VolumeSummary } from '../admin-types.ts'
import { allPages } from '../client/all-pages.ts'
import { segment } from '../client/admin-client.ts'
import { bytesIfKnown, formatBytes } from '../terminal/format-bytes.ts'
import { formatFields, formatTable } from '../terminal/table.ts'
import { attachmentNote, attachmentText } from './attachment-formats.ts'
import type { AttachmentFormat } from './attachment-formats.ts'
import { contextOf, withExample } from './command-context.ts'
import { moveText } from './move.ts'

export function register(volume: Command): void {
  registerLife(volume)
  registerShape(volume)
  registerAttachment(volume)
}

function registerLife(volume: Command): void {
  withExample(
    volume
      .command('create')
      .description(
        'make a volume, empty or from an image, a snapshot or another volume of any pool (in milliseconds, whatever its size)',
      )
      .argument('<name>')
      .option('--size <size>', 'bytes, or with K, M, G, T; may be left out with --from, and may be larger than the source')
      .option('--pool <pool>', 'name or id of the pool (default: the source’s, else "default")')
      .option('--from <source>', 'image:NAME, snapshot:VOL@SNAP, volume:NAME or file:CONTAINER/NAME')
      .action(async (name: string, options: { size?: string; pool?: string; from?: string }, command: Command) => {
        const context = contextOf(command)
        const body = { name, size: options.size, pool: options.pool, from: options.from, project: context.project }
        const document = await context.client.post<CreatedVolumeDocument>('/v1/volumes', body)
        context.print(document, () => document.id)
        const { pool, readsFrom } = document
        if (readsFrom.length > 0 && !context.json)
          process.stderr.write(`what it does not write itself in ${pool} it reads from ${readsFrom.join(', ')}\n`)
      }),
    'atoll volume create root --from image:debian --size 20G',
    'atoll volume create data --size 1T',
  )
  withExample(
    volume
      .command('list')
      .description('show all volumes')
      .action(async (_options: unknown, command: Command) => {
        const context = contextOf(command)
        const documents = await allPages<VolumeSummary>(context.client, '/v1/volumes', { project: context.project })
        context.print(documents, () =>
          formatTable(
            ['name', 'size', 'status', 'pool', 'attached', 'id'],
            documents.map((document) => [
              document.name,
              formatBytes(document.sizeBytes),
              document.status,
              document.pool,
              document.attachments.map((attachment) => attachment.protocol).join(', '),
              document.id,
            ]),
          ),
        )
      }),
    'atoll volume list',
  )
  withExample(
    volume
      .command('show')
      .description('show one volume')
      .argument('<volume>', 'name or id')
      .action(async (name: string, _options: unknown, command: Command) => {
        const context = contextOf(command)
        const document = await context.client.get<VolumeDocument>(`/v1/volumes/${segment(name)}`, { project: context.project })
        context.print(document, () => volumeText(document))
      }),
    'atoll volume show root',
  )
  withExample(
    volume
      .command('delete')
      .description('delete a volume that is not attached')
      .argument('<volume>', 'name or id')
      .option('--with-snapshots', 'delete its snapshots too')
      .action(async (name: string, options: { withSnapshots?: boolean }, command: Command) => {
        const context = contextOf(command)
        const query = { project: context.project, withSnapshots: options.withSnapshots === true }
        context.print(await context.client.delete(`/v1/volumes/${segment(name)}`, query), () => `deleted ${name}`)
      }),
    'atoll volume delete root --with-snapshots',
  )
}

function registerShape(volume: Command): void {
  withExample(
    volume
      .command('rename')
      .description('give a volume another name')
      .argument('<volume>', 'name or id')
      .argument('<new-name>')
      .action(async (name: string, newName: string, _options: unknown, command: Command) => {
        const context = contextOf(command)
        const body = { name: newName, project: context.project }
        const document = await context.client.post<VolumeSummary>(`/v1/volumes/${segment(name)}/rename`, body)
        context.print(document, () => `${name} is now ${document.name}`)
      }),
    'atoll volume rename root old-root',
  )
  withExample(
    volume
      .command('resize')
      .description('grow a volume at any time, or shrink it with --force')
      .argument('<volume>', 'name or id')
      .argument('<size>', 'bytes, or with K, M, G, T')
      .option('--force', 'shrink: what lies behind the new end is lost')
      .action(async (name: string, size: string, options: { force?: boolean }, command: Command) => {
        const context = contextOf(command)
        const body = { size, force: options.force === true, project: context.project }
        const document = await context.client.post<VolumeSummary>(`/v1/volumes/${segment(name)}/resize`, body)
        context.print(document, () => `${document.name} has ${formatBytes(document.sizeBytes)}`)
      }),
    'atoll volume resize root 40G',
  )
}

function registerAttachment(volume: Command): void {
  withExample(
    volume
      .command('attach')
      .description('show a volume as a block device; the attachment survives restarts of the daemon')
      .argument('<volume>', 'name or id')
      .addOption(new Option('--protocol <protocol>', 'how clients speak to it').choices(['nbd']).default('nbd'))
      .option('--read-only', 'refuse writes')
      .option('--shared', 'allow further attachments with other options')
      .option('--take-over', 'shut out another daemon that has the volume and does not let go of it (only where the pool can)')
      .addOption(new Option('--format <format>', 'what to print').choices(['text', 'uri', 'qemu', 'libvirt']).default('text'))
      .action(async (name: string, options: AttachOptions, command: Command) => {
        const context = contextOf(command)
        const body = {
          protocol: options.protocol,
          readOnly: options.readOnly === true,
          shared: options.shared === true,
          takeOver: options.takeOver === true,
          project: context.project,
        }
        const document = await context.client.post<AttachmentDocument>(`/v1/volumes/${segment(name)}/attach`, body)
        context.print(document, () => attachmentText(document, options.format))
        const note = attachmentNote(document, options.format)
        if (note !== null && !context.json) process.stderr.write(`${note}\n`)
      }),
    'qemu-io -f raw -c "write -P 7 0 64k" "$(atoll volume attach root --format uri)"',
  )
  withExample(
    volume
      .command('detach')
      .description('drain and disconnect the clients of a volume, then close it')
      .argument('<volume>', 'name or id')
      .action(async (name: string, _options: unknown, command: Command) => {
        const context = contextOf(command)
        const document = await context.client.post(`/v1/volumes/${segment(name)}/detach`, { project: context.project })
        context.print(document, () => `detached ${name}`)
      }),
    'atoll volume detach root',
  )
}

interface AttachOptions {
  readonly protocol: string
  readonly readOnly?: boolean
  readonly shared?: boolean
  readonly takeOver?: boolean
  readonly format: AttachmentFormat
}

function volumeText(volume: VolumeDocument): string {
  return formatFields([
    ['id', volume.id],
    ['name', volume.name],
    ['status', volume.status],
    ['size', `${formatBytes(volume.sizeBytes)} (${volume.sizeBytes} bytes)`],
    ['pool', volume.pool],
    ['moving', volume.move === null ? null : moveText(volume.move)],
    ['reads from', volume.readsFrom.join(', ')],
    ['parent', volume.parent],
    ['snapshots', volume.snapshots.join(', ')],
    ['error', volume.error === null ? null : `${volume.error.code}: ${volume.error.message}`],
    ['used', bytesIfKnown(volume.usedBytes)],
    ['shared', bytesIfKnown(volume.sharedBytes)],
    ['created', volume.createdAt],
    ...volume.attachments.map((attachment) => ['attached', attachmentText(attachment, 'text')] as const),
  ])
}
