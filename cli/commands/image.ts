import { fstatSync } from 'node:fs'
import { resolve } from 'node:path'
import { Option } from 'commander'
import type { Command } from 'commander'
import type { ImageDocument, ImageSummary, JobDocument } from '../admin-types.ts'
import { allPages } from '../client/all-pages.ts'
import { segment } from '../client/admin-client.ts'
import { usageError } from '../client/cli-error.ts'
import { bytesIfKnown, formatBytes } from '../terminal/format-bytes.ts'
import { ProgressLine } from '../terminal/progress.ts'
import { formatFields, formatTable } from '../terminal/table.ts'
import { countingStream } from '../terminal/upload-progress.ts'
import { contextOf, withExample } from './command-context.ts'
import type { CommandContext } from './command-context.ts'
import { waitForJob } from './wait-for-job.ts'

export function register(image: Command): void {
  registerTransfer(image)
  registerCatalog(image)
}

interface ImportOptions {
  readonly pool?: string
  readonly format?: string
  readonly wait: boolean
}

function registerTransfer(image: Command): void {
  withExample(
    image
      .command('import')
      .description('make an image from a file, a URL or standard input')
      .argument('<name>')
      .argument('<source>', 'a path, an http(s):// or nbd:// or nbd+unix:// URL, or - for standard input')
      .option('--pool <pool>', 'name or id of the pool (default: "default")')
      .addOption(
        new Option('--format <format>', 'what the source is; with raw it is never looked at (default: detected)').choices([
          'raw',
          'qcow2',
          'vmdk',
          'vdi',
          'vhdx',
          'vhd',
        ]),
      )
      .option('--no-wait', 'return as soon as the job runs')
      .action(async (name: string, source: string, options: ImportOptions, command: Command) => {
        const context = contextOf(command)
        const target = { name, pool: options.pool, format: options.format, project: context.project }
        const job = await importSource(context, target, source, options.wait)
        if (job.state !== 'done') {
          context.print(job, () => `job ${job.id}`)
          return
        }
        const document = await context.client.get<ImageDocument>(`/v1/images/${segment(job.subject)}`, {
          project: context.project,
        })
        context.print(document, () => document.id)
      }),
    'atoll image import debian debian-12.qcow2',
    'atoll image import debian https://cloud.debian.org/images/cloud/bookworm/latest/debian-12-generic-amd64.qcow2',
    'zcat disk.raw.gz | atoll image import disk -',
  )
  withExample(
    image
      .command('export')
      .description('write an image to a file')
      .argument('<image>', 'name or id')
      .argument('<dest>', 'path of the file')
      .addOption(new Option('--format <format>', 'what to write').choices(['raw', 'qcow2']).default('raw'))
      .option('--compress', 'compress the clusters of a qcow2 file')
      .option('--force', 'replace the file if there is one')
      .option('--no-wait', 'return as soon as the job runs')
      .action(async (name: string, dest: string, options: ExportOptions, command: Command) => {
        const context = contextOf(command)
        const body = {
          path: resolve(dest),
          format: options.format,
          compress: options.compress === true,
          overwrite: options.force === true,
          project: context.project,
        }
        const started = await context.client.post<JobDocument>(`/v1/images/${segment(name)}/export`, body)
        const job = options.wait ? await waitForJob(context, started, `export ${name}`) : started
        context.print(job, () => (options.wait ? `wrote ${body.path}` : `job ${job.id}`))
      }),
    'atoll image export debian /srv/debian.img',
    'atoll image export debian /srv/debian.qcow2 --format qcow2 --compress',
  )
}

interface ExportOptions {
  readonly format: string
  readonly compress?: boolean
  readonly force?: boolean
  readonly wait: boolean
}

interface ImportTarget {
  readonly name: string
  readonly pool: string | undefined
  readonly format: string | undefined
  readonly project: string | undefined
}

async function importSource(context: CommandContext, target: ImportTarget, source: string, wait: boolean): Promise<JobDocument> {
  if (source === '-') return await importStdin(context, target)
  const body = { ...target, source: isUrl(source) ? source : resolve(source) }
  const started = await context.client.post<JobDocument>('/v1/images/import', body)
  return wait ? await waitForJob(context, started, `import ${target.name}`) : started
}

function isUrl(source: string): boolean {
  return /^[a-z][a-z0-9+.-]*:\/\//.test(source)
}

/** Returns when the stream is an image: the bytes come through this process, so there is nothing to go on without it. */
async function importStdin(context: CommandContext, target: ImportTarget): Promise<JobDocument> {
  if (process.stdin.isTTY) throw usageError('standard input is a terminal: pipe the image into this command')
  // A file that was redirected has a length, which lets the daemon refuse at once what cannot fit.
  const stat = fstatSync(process.stdin.fd)
  const sizeBytes = stat.isFile() ? stat.size : undefined
  const line = new ProgressLine(`import ${target.name}`, process.stderr)
  const stream = countingStream(line, sizeBytes ?? null)
  process.stdin.on('error', (error) => stream.destroy(error))
  process.stdin.pipe(stream)
  try {
    return await context.client.upload<JobDocument>('/v1/images/upload', { ...target, sizeBytes }, stream)
  } finally {
    line.end()
    process.stdin.destroy()
  }
}

function registerCatalog(image: Command): void {
  withExample(
    image
      .command('create')
      .description('make an image of something else, without copying')
      .argument('<name>')
      .requiredOption('--from <source>', 'VOLUME@SNAPSHOT, volume:NAME (as it is now), file:CONTAINER/NAME or image:NAME')
      .action(async (name: string, options: { from: string }, command: Command) => {
        const context = contextOf(command)
        const body = { name, from: options.from, project: context.project }
        const document = await context.client.post<ImageSummary>('/v1/images', body)
        context.print(document, () => document.id)
      }),
    'atoll image create golden --from root@clean',
    'atoll image create installer --from file:isos/installer.iso',
  )
  withExample(
    image
      .command('list')
      .description('show all images')
      .action(async (_options: unknown, command: Command) => {
        const context = contextOf(command)
        const documents = await allPages<ImageSummary>(context.client, '/v1/images', { project: context.project })
        context.print(documents, () =>
          formatTable(
            ['name', 'size', 'status', 'pool', 'created', 'id'],
            documents.map((document) => [
              document.name,
              formatBytes(document.sizeBytes),
              document.status,
              document.pool,
              document.createdAt,
              document.id,
            ]),
          ),
        )
      }),
    'atoll image list',
  )
  withExample(
    image
      .command('show')
      .description('show one image')
      .argument('<image>', 'name or id')
      .action(async (name: string, _options: unknown, command: Command) => {
        const context = contextOf(command)
        const document = await context.client.get<ImageDocument>(`/v1/images/${segment(name)}`, { project: context.project })
        context.print(document, () => imageText(document))
      }),
    'atoll image show debian',
  )
  withExample(
    image
      .command('delete')
      .description('delete an image; volumes made from it keep their data')
      .argument('<image>', 'name or id')
      .action(async (name: string, _options: unknown, command: Command) => {
        const context = contextOf(command)
        const query = { project: context.project }
        context.print(await context.client.delete(`/v1/images/${segment(name)}`, query), () => `deleted ${name}`)
      }),
    'atoll image delete debian',
  )
}

function imageText(image: ImageDocument): string {
  return formatFields([
    ['id', image.id],
    ['name', image.name],
    ['status', image.status],
    ['size', `${formatBytes(image.sizeBytes)} (${image.sizeBytes} bytes)`],
    ['pool', image.pool],
    ['parent', image.parent],
    ['used', bytesIfKnown(image.usedBytes)],
    ['shared', bytesIfKnown(image.sharedBytes)],
    ['created', image.createdAt],
  ])
}
