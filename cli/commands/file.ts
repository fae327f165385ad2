import { constants } from 'node:fs'
import { open } from 'node:fs/promises'
import type { FileHandle } from 'node:fs/promises'
import type { Readable } from 'node:stream'
import type { Command } from 'commander'
import type { ContainerDocument, FileDocument, FileListingDocument, FileSummary } from '../admin-types.ts'
import { CliError, usageError } from '../client/cli-error.ts'
import { saveSparse, saveStream, takesHoles } from '../client/save-stream.ts'
import { sparseContentType } from '../sparse-frames.ts'
import { bytesIfKnown, formatBytes } from '../terminal/format-bytes.ts'
import { ProgressLine } from '../terminal/progress.ts'
import { formatFields, formatTable } from '../terminal/table.ts'
import { countingStream, progressOn } from '../terminal/upload-progress.ts'
import { contextOf, withExample } from './command-context.ts'
import type { CommandContext } from './command-context.ts'

/** Entries asked for at a time. */
const listingPage = 2000

export function register(file: Command): void {
  registerContent(file)
  registerNames(file)
  registerContainers(file)
}

/** `all` is false behind `--no-…`. */
function collect(value: string, all: readonly string[] | false): string[] {
  return [...(all === false ? [] : all), value]
}

interface PutOptions {
  readonly from?: string
  readonly meta: readonly string[]
  readonly contentType?: string
  readonly pool?: string
  readonly replace: boolean
}

interface SetOptions {
  /** false: `--no-meta`. */
  readonly meta: readonly string[] | false
  readonly contentType?: string
}

interface GetOptions {
  readonly offset?: string
  readonly length?: string
  readonly version?: string
}

function registerContent(file: Command): void {
  withExample(
    file
      .command('put')
      .description(
        'store a file, or share the content of something else without copying; the container is made if it is not there',
      )
      .argument('<container/name>')
      .argument('[path]', 'what to store, or - for standard input')
      .option(
        '--from <source>',
        'instead of a path: image:NAME, snapshot:VOLUME@SNAPSHOT, volume:NAME (as it is now) or file:CONTAINER/NAME',
      )
      .option('--meta <key=value>', 'something to remember about it; may be repeated', collect, [])
      .option('--content-type <type>', 'what it is (default: application/octet-stream, or what the source is)')
      .option('--pool <pool>', 'name or id of the pool (default: "default", or that of the source)')
      .option('--no-replace', 'refuse a name that is taken')
      .action(async (path: string, source: string | undefined, options: PutOptions, command: Command) => {
        const context = contextOf(command)
        if ((source === undefined) === (options.from === undefined)) throw usageError('name either a path or --from')
        if (options.from !== undefined && options.pool !== undefined)
          throw usageError('with --from the pool is that of the source')
        const metadata = options.meta.length === 0 ? undefined : readMetadata(options.meta)
        const { contentType, pool } = options
        const target = { path, contentType, onlyIfNew: !options.replace, project: context.project }
        const document =
          options.from === undefined
            ? await upload(context, source ?? '-', { ...target, pool, metadata: metadata && JSON.stringify(metadata) })
            : await context.client.post<FileSummary>('/v1/file/share', { ...target, from: options.from, metadata })
        context.print(document, () => document.id)
      }),
    'atoll file put logs/2026/november.log november.log --content-type text/plain',
    'tar c notes | atoll file put backup/notes.tar -',
    'atoll file put disks/root.img --from volume:root',
  )
  withExample(
    file
      .command('get')
      .description('write a file, or anything else as a file, to a path')
      .argument('<container/name>', 'or an id, image:NAME, snapshot:VOLUME@SNAPSHOT, volume:NAME (as it is now)')
      .argument('<dest>', 'path of the file, which is replaced when all is there; - for standard output')
      .option('--offset <size>', 'begin here')
      .option('--length <size>', 'at most so many bytes')
      .option('--version <id>', 'an older version')
      .action(async (path: string, dest: string, options: GetOptions, command: Command) => {
        const context = contextOf(command)
        const isSource = /^(image|snapshot|volume):[^/]*$/.test(path)
        if (isSource && options.version !== undefined) throw usageError(`${path} has no versions`)
        const query = {
          ...(isSource ? { source: path } : { path, version: options.version }),
          offset: options.offset,
          length: options.length,
          project: context.project,
        }
        const sparse = await takesHoles(dest)
        let writtenBytes = 0
        await context.client.download(
          '/v1/file/content',
          { query, accept: sparse ? sparseContentType : '*/*' },
          async (body, lengthBytes) => {
            writtenBytes = lengthBytes
            await save(body, lengthBytes, { path, dest, sparse })
          },
        )
        if (dest !== '-') context.print({ path: dest, sizeBytes: writtenBytes }, () => `wrote ${dest}`)
      }),
    'atoll file get logs/2026/november.log november.log',
    'atoll file get snapshot:root@clean - --length 1M | file -',
  )
}

function readMetadata(pairs: readonly string[]): Record<string, string> {
  return Object.fromEntries(
    pairs.map((pair) => {
      const separator = pair.indexOf('=')
      if (separator <= 0) throw usageError(`--meta ${pair}: KEY=VALUE is wanted`)
      return [pair.slice(0, separator), pair.slice(separator + 1)]
    }),
  )
}

/** Sends a file or standard input; the answer comes when the daemon has stored all of it. */
async function upload(
  context: CommandContext,
  source: string,
  target: Readonly<Record<string, string | boolean | undefined>> & { readonly path: string },
): Promise<FileSummary> {
  if (source === '-' && process.stdin.isTTY) throw usageError('standard input is a terminal: pipe the content into this command')
  const handle = source === '-' ? null : await openSource(source)
  // What has a length lets the daemon notice when it ends early.
  const sizeBytes = handle === null ? undefined : await lengthOf(handle)
  const line = new ProgressLine(`put ${target.path}`, process.stderr)
  const stream = countingStream(line, sizeBytes ?? null)
  const input: Readable = handle === null ? process.stdin : handle.createReadStream({ autoClose: false, ...until(sizeBytes) })
  input.on('error', (error) => stream.destroy(error))
  input.pipe(stream)
  try {
    return await context.client.upload<FileSummary>('/v1/file/content', { ...target, sizeBytes }, stream)
  } finally {
    line.end()
    input.destroy()
    await handle?.close()
  }
}

/** A file that grows meanwhile is stored as long as it was at first. */
function until(sizeBytes: number | undefined): { start?: number; end?: number } {
  return sizeBytes === undefined ? {} : { start: 0, end: sizeBytes - 1 }
}

async function openSource(path: string): Promise<FileHandle> {
  try {
    const handle = await open(path, constants.O_RDONLY)
    if ((await handle.stat()).isDirectory()) {
      await handle.close()
      throw new Error('it is a directory')
    }
    return handle
  } catch (error) {
    throw new CliError('IO_ERROR', `cannot read ${path}: ${error instanceof Error ? error.message : String(error)}`)
  }
}

async function lengthOf(handle: FileHandle): Promise<number | undefined> {
  const stat = await handle.stat()
  // Files of the kernel have content that their size does not tell.
  return stat.isFile() && stat.size > 0 ? stat.size : undefined
}

async function save(
  body: Readable,
  lengthBytes: number,
  { path, dest, sparse }: { path: string; dest: string; sparse: boolean },
): Promise<void> {
  const line = new ProgressLine(`get ${path}`, process.stderr)
  try {
    if (sparse) {
      await saveSparse(body as AsyncIterable<Buffer>, lengthBytes, { dest, onProgress: progressOn(line, lengthBytes) })
      return
    }
    const counted = countingStream(line, lengthBytes)
    body.on('error', (error) => counted.destroy(error))
    body.pipe(counted)
    await saveStream(counted, dest)
  } finally {
    line.end()
    body.destroy()
  }
}

interface ListOptions {
  readonly prefix?: string
  readonly delimiter?: string
  readonly marker?: string
  readonly endMarker?: string
  readonly limit?: string
  readonly versions?: boolean
}

function registerNames(file: Command): void {
  withExample(
    file
      .command('list')
      .description('show the containers, or what is in one')
      .argument('[container]')
      .option('--prefix <text>', 'only names that begin so')
      .option('--delimiter <text>', 'show names only up to this text behind the prefix, each beginning once')
      .option('--marker <name>', 'only what comes after this name')
      .option('--end-marker <name>', 'only what comes before this name')
      .option('--limit <n>', 'at most so many')
      .option('--versions', 'every version, the newest of a name first, and what was deleted')
      .action(async (container: string | undefined, options: ListOptions, command: Command) => {
        const context = contextOf(command)
        if (container === undefined) {
          if (Object.keys(options).length > 0) throw usageError('these options want a container')
          await printContainers(context)
          return
        }
        const entries = await listAll(context, container, options)
        context.print(entries, () => (options.versions === true ? versionsTable(entries) : filesTable(entries)))
      }),
    'atoll file list',
    'atoll file list logs --prefix 2026/ --delimiter /',
  )
  withExample(
    file
      .command('show')
      .description('show one file, or a container')
      .argument('<container/name>', 'or an id; without a name: the container')
      .option('--version <id>', 'an older version')
      .action(async (path: string, options: { version?: string }, command: Command) => {
        const context = contextOf(command)
        const { project } = context
        if (!path.includes('/') && !isIdText(path)) {
          const document = await context.client.get<ContainerDocument>('/v1/container', { container: path, project })
          context.print(document, () => containerText(document))
          return
        }
        const document = await context.client.get<FileDocument>('/v1/file', { path, version: options.version, project })
        context.print(document, () => fileText(document))
      }),
    'atoll file show logs/2026/november.log',
  )
  withExample(
    file
      .command('set')
      .description('change what is said about a file; its content stays')
      .argument('<container/name>', 'or an id')
      .option(
        '--meta <key=value>',
        'something to remember about it, instead of all that was said before; may be repeated',
        collect,
        [],
      )
      .option('--no-meta', 'forget all that was said')
      .option('--content-type <type>', 'what it is')
      .action(async (path: string, options: SetOptions, command: Command) => {
        const context = contextOf(command)
        const { contentType, meta } = options
        const metadata = meta === false ? {} : meta.length === 0 ? undefined : readMetadata(meta)
        if (metadata === undefined && contentType === undefined)
          throw usageError('say what to change: --meta, --no-meta or --content-type')
        const body = { path, metadata, contentType, project: context.project }
        const document = await context.client.post<FileSummary>('/v1/file', body)
        context.print(document, () => document.id)
      }),
    'atoll file set logs/2026/november.log --meta reviewed=yes --content-type text/plain',
  )
  withExample(
    file
      .command('delete')
      .description('delete a file; a versioned container keeps what was there')
      .argument('<container/name>', 'or the id of a version')
      .option('--version <id>', 'this version, for good')
      .action(async (path: string, options: { version?: string }, command: Command) => {
        const context = contextOf(command)
        const query = { path, version: options.version, project: context.project }
        context.print(await context.client.delete('/v1/file', query), () => `deleted ${path}`)
      }),
    'atoll file delete logs/2026/november.log',
  )
}

function isIdText(text: string): boolean {
  return /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/i.test(text)
}

type Entry = FileListingDocument['entries'][number]

/** Page by page, so that no request is large; all of it, or the limit. */
async function listAll(context: CommandContext, container: string, options: ListOptions): Promise<Entry[]> {
  const limit = options.limit === undefined ? Infinity : Number(options.limit)
  if (!(limit >= 1) || (limit !== Infinity && !Number.isSafeInteger(limit))) {
    throw usageError(`--limit ${options.limit}: a whole number from 1 on is wanted`)
  }
  const entries: Entry[] = []
  let next: FileListingDocument['next'] = { marker: options.marker ?? '', versionMarker: null }
  while (next !== null && entries.length < limit) {
    const page: FileListingDocument = await context.client.get<FileListingDocument>('/v1/files', {
      container,
      prefix: options.prefix,
      delimiter: options.delimiter,
      endMarker: options.endMarker,
      versions: options.versions,
      marker: next.marker,
      versionMarker: next.versionMarker ?? undefined,
      limit: Math.min(listingPage, limit - entries.length),
      project: context.project,
    })
    entries.push(...page.entries)
    next = page.next
  }
  return entries
}

/** A name on one line of a terminal, whatever is in it. */
function printable(name: string): string {
  return /[\p{Cc}\p{Cf}\u2028\u2029]/u.test(name) ? JSON.stringify(name) : name
}

function filesTable(entries: readonly Entry[]): string {
  return formatTable(
    ['name', 'size', 'type', 'created'],
    entries.map((entry) =>
      'commonPrefix' in entry
        ? [printable(entry.commonPrefix), '', '', '']
        : [printable(entry.name), formatBytes(entry.sizeBytes), entry.contentType, entry.createdAt],
    ),
  )
}

function versionsTable(entries: readonly Entry[]): string {
  return formatTable(
    ['name', 'size', 'what', 'created', 'version'],
    entries.map((entry) =>
      'commonPrefix' in entry
        ? [printable(entry.commonPrefix), '', '', '', '']
        : [
            printable(entry.name),
            entry.deleteMarker ? '' : formatBytes(entry.sizeBytes),
            versionKind(entry),
            entry.createdAt,
            entry.id,
          ],
    ),
  )
}

function versionKind(file: FileSummary): string {
  if (file.deleteMarker) return 'deleted'
  return file.current ? 'current' : 'old'
}

function fileText(file: FileDocument): string {
  return formatFields([
    ['id', file.id],
    ['container', printable(file.container)],
    ['name', printable(file.name)],
    ['what', file.current ? null : versionKind(file)],
    ['size', `${formatBytes(file.sizeBytes)} (${file.sizeBytes} bytes)`],
    ['type', file.contentType],
    ['md5', file.etag ?? (file.deleteMarker ? null : 'not known: made without reading the content')],
    ['pool', file.pool],
    ['used', bytesIfKnown(file.usedBytes)],
    ['shared', bytesIfKnown(file.sharedBytes)],
    ['created', file.createdAt],
    ...Object.entries(file.metadata).map(([key, value]) => [`meta ${printable(key)}`, printable(value)] as const),
  ])
}

function containerText(container: ContainerDocument): string {
  return formatFields([
    ['id', container.id],
    ['name', printable(container.name)],
    ['files', String(container.fileCount)],
    ['size', formatBytes(container.sizeBytes)],
    ['versioned', container.versioned ? 'on' : 'off'],
    ['created', container.createdAt],
    ...Object.entries(container.metadata).map(([key, value]) => [`meta ${printable(key)}`, printable(value)] as const),
  ])
}

async function printContainers(context: CommandContext): Promise<void> {
  const documents = await context.client.get<ContainerDocument[]>('/v1/containers', { project: context.project })
  context.print(documents, () =>
    formatTable(
      ['container', 'files', 'size', 'versioned', 'created'],
      documents.map((document) => [
        printable(document.name),
        String(document.fileCount),
        formatBytes(document.sizeBytes),
        document.versioned ? 'on' : 'off',
        document.createdAt,
      ]),
    ),
  )
}

interface ContainerOptions {
  readonly versioned?: boolean
  readonly meta: readonly string[]
}

function containerBody(context: CommandContext, container: string, { versioned, meta }: ContainerOptions): object {
  return { container, versioned, metadata: meta.length === 0 ? undefined : readMetadata(meta), project: context.project }
}

function registerContainers(file: Command): void {
  const container = withExample(
    file.command('container').description('make, change and delete containers'),
    'atoll file container create notes --versioned on',
  )
  const onOff = (text: string): boolean => {
    if (text !== 'on' && text !== 'off') throw usageError(`--versioned ${text}: on or off is wanted`)
    return text === 'on'
  }
  withExample(
    container
      .command('create')
      .description('make a container; a put makes one by itself')
      .argument('<container>')
      .option('--versioned <on|off>', 'keep what puts and deletes replace (default: off)', onOff)
      .option('--meta <key=value>', 'something to remember about it; may be repeated', collect, [])
      .action(async (name: string, options: ContainerOptions, command: Command) => {
        const context = contextOf(command)
        const document = await context.client.post<ContainerDocument>('/v1/containers', containerBody(context, name, options))
        context.print(document, () => document.id)
      }),
    'atoll file container create notes --versioned on',
  )
  withExample(
    container
      .command('set')
      .description('change a container')
      .argument('<container>')
      .option('--versioned <on|off>', 'keep what puts and deletes replace', onOff)
      .option('--meta <key=value>', 'something to remember about it; KEY= forgets that; may be repeated', collect, [])
      .action(async (name: string, options: ContainerOptions, command: Command) => {
        const context = contextOf(command)
        if (options.versioned === undefined && options.meta.length === 0)
          throw usageError('say what to change: --versioned or --meta')
        const document = await context.client.post<ContainerDocument>('/v1/container', containerBody(context, name, options))
        context.print(document, () => containerText(document))
      }),
    'atoll file container set notes --versioned off',
  )
  withExample(
    container
      .command('delete')
      .description('delete a container that is empty')
      .argument('<container>')
      .action(async (name: string, _options: unknown, command: Command) => {
        const context = contextOf(command)
        const query = { container: name, project: context.project }
        context.print(await context.client.delete('/v1/container', query), () => `deleted ${name}`)
      }),
    'atoll file container delete notes',
  )
}
