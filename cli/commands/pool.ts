import type { Command } from 'commander'
import type { JobDocument, PoolAcceptDocument, PoolDocument, PoolImportDocument } from '../admin-types.ts'
import { segment } from '../client/admin-client.ts'
import { usageError } from '../client/cli-error.ts'
import { formatBytes } from '../terminal/format-bytes.ts'
import { formatFields, formatTable } from '../terminal/table.ts'
import { contextOf, withExample } from './command-context.ts'
import { readOptions } from './key-value.ts'
import { move, moveText, withMoveOptions, type MoveOptions } from './move.ts'
import { waitForJob } from './wait-for-job.ts'

interface ImportOptions {
  readonly driver?: string
  readonly option: string[]
  readonly takeOver: boolean
  readonly dryRun: boolean
}

export function register(pool: Command): void {
  withExample(
    pool
      .command('create')
      .description('make a pool on a backend')
      .argument('<name>')
      .requiredOption('--driver <driver>', 'what keeps its bytes, such as file or ceph')
      .option('--option <key=value>', 'option of the driver; KEY=@FILE reads the value from a file', collect, [])
      .option('--set <key=value>', 'setting of the pool as `pool set` takes it: overcommit, low-space, reserve', collect, [])
      .action(async (name: string, options: { driver: string; option: string[]; set: string[] }, command: Command) => {
        const context = contextOf(command)
        const body = {
          name,
          driver: options.driver,
          options: await readOptions(options.option),
          settings: readSettings(options.set),
          project: context.project,
        }
        const document = await context.client.post<PoolDocument>('/v1/pools', body)
        context.print(document, () => document.id)
      }),
    'atoll pool create fast --driver file --option path=/mnt/nvme/atoll',
    'atoll pool create big --driver file --option path=/mnt/disks/atoll --set overcommit=10 --set reserve=1G',
  )
  withExample(
    pool
      .command('import')
      .description('bring back what is in a pool whose catalog is lost')
      .argument('<name>', 'a pool that is not open because it belongs to another catalog; with --driver, the name that it gets')
      .option('--driver <driver>', 'where the pool lies, if this home does not know it')
      .option('--option <key=value>', 'option of the driver; KEY=@FILE reads the value from a file', collect, [])
      .option('--take-over', 'the pool belongs to another catalog, which is lost and will not come back', false)
      .option('--dry-run', 'say what would be brought back, and change nothing', false)
      .action(async (name: string, options: ImportOptions, command: Command) => {
        const context = contextOf(command)
        const place = options.driver === undefined ? {} : { driver: options.driver, options: await readOptions(options.option) }
        if (options.driver === undefined && options.option.length > 0) throw usageError('--option needs --driver')
        const { takeOver, dryRun } = options
        const report = await context.client.post<PoolImportDocument>('/v1/pool-imports', { name, ...place, takeOver, dryRun })
        context.print(report, () => importText(report))
        if (report.failed.length + report.damages.length > 0) process.exitCode = 1
      }),
    'atoll pool import default --take-over',
  )
  withExample(
    pool
      .command('accept')
      .description(
        'let an older catalog count for a pool, and give up what the pool has newer, and pools that are lost with theirs',
      )
      .argument('<pool>', 'name or id of a pool whose export is ahead of the catalog, or that pools read from which are not here')
      .option('--yes', 'do it; without this it only says what would be given up', false)
      .action(async (name: string, { yes }: { yes: boolean }, command: Command) => {
        const context = contextOf(command)
        const report = await context.client.post<PoolAcceptDocument>(`/v1/pools/${segment(name)}/accept`, { confirmed: yes })
        context.print(report, () => acceptText(report))
        if (!report.accepted) process.exitCode = 1
      }),
    'atoll pool accept default --yes',
  )
  withExample(
    pool
      .command('list')
      .description('show all pools')
      .action(async (_options: unknown, command: Command) => {
        const context = contextOf(command)
        const documents = await context.client.get<PoolDocument[]>('/v1/pools')
        context.print(documents, () =>
          formatTable(
            ['name', 'driver', 'state', 'free', 'total', 'stored', 'layers', 'id'],
            documents.map((document) => [
              document.name,
              document.driver,
              poolState(document),
              formatBytes(document.freeBytes),
              formatBytes(document.totalBytes),
              formatBytes(document.storedBytes),
              document.layers,
              document.id,
            ]),
          ),
        )
      }),
    'atoll pool list',
  )
  withExample(
    pool
      .command('show')
      .description('show one pool')
      .argument('<pool>', 'name or id')
      .action(async (name: string, _options: unknown, command: Command) => {
        const context = contextOf(command)
        const document = await context.client.get<PoolDocument>(`/v1/pools/${segment(name)}`)
        context.print(document, () => poolText(document))
      }),
    'atoll pool show default',
  )
  withExample(
    pool
      .command('delete')
      .description('delete an empty pool')
      .argument('<pool>', 'name or id')
      .action(async (name: string, _options: unknown, command: Command) => {
        const context = contextOf(command)
        context.print(await context.client.delete(`/v1/pools/${segment(name)}`), () => `deleted ${name}`)
      }),
    'atoll pool delete fast',
  )
  withExample(
    pool
      .command('set')
      .description('change the over-commit limit, the low-space alarm and the reserve of a pool')
      .argument('<pool>', 'name or id')
      .argument(
        '<setting...>',
        'overcommit=RATIO|unlimited, low-space=PERCENT%|SIZE|off, reserve=SIZE; KEY=default takes one back',
      )
      .action(async (name: string, pairs: string[], _options: unknown, command: Command) => {
        const context = contextOf(command)
        const body = { settings: readSettings(pairs) }
        const document = await context.client.post<PoolDocument>(`/v1/pools/${segment(name)}/settings`, body)
        context.print(document, () => poolText(document))
      }),
    'atoll pool set default overcommit=10 low-space=50G reserve=1G',
  )
  withExample(
    pool
      .command('check')
      .description('compare what the backend holds with what the catalog says')
      .argument('<pool>', 'name or id')
      .action(async (name: string, _options: unknown, command: Command) => {
        const context = contextOf(command)
        const document = await context.client.post<PoolCheck>(`/v1/pools/${segment(name)}/check`)
        context.print(document, () => checkText(document))
        if (document.findings.some((finding) => finding.severity === 'error')) process.exitCode = 1
      }),
    'atoll pool check default',
  )
  withExample(
    pool
      .command('reclaim')
      .description('free what no volume, snapshot or image refers to any more')
      .argument('<pool>', 'name or id')
      .action(async (name: string, _options: unknown, command: Command) => {
        const context = contextOf(command)
        const started = await context.client.post<JobDocument>(`/v1/pools/${segment(name)}/reclaim`)
        const job = await waitForJob(context, started, `reclaim ${name}`)
        context.print(job, () => reclaimText(job))
      }),
    'atoll pool reclaim default',
  )
  withExample(
    withMoveOptions(
      pool
        .command('drain')
        .description('move everything out of a pool while it is used; nothing new is made in it from then on')
        .argument('<pool>', 'name or id'),
    ).action(async (name: string, options: MoveOptions, command: Command) => {
      await move(command, `/v1/pools/${segment(name)}/drain`, `drain ${name}`, options, {})
    }),
    'atoll pool drain old --to fast --limit 100M --wait',
  )
}

/** The parts of a report that are lists: what is named in each, and what it means. */
const listsOfImport = {
  failed: 'could not be brought back',
  asImages: 'snapshots that are images now, since their volumes could not be brought back',
  uncertain: 'may be out of date, since records of the export are damaged or missing',
  damages: 'damaged or missing in the export',
} as const

function importText(report: PoolImportDocument): string {
  const { volume, snapshot, image, file } = report.broughtBack
  const counts = `${volume} volumes, ${snapshot} snapshots, ${image} images and ${file} files`
  const time = report.exportedAt === null ? '' : `, exported last at ${report.exportedAt}`
  const lines = [`${report.dryRun ? 'would bring' : 'brought'} back ${counts}${time}`]
  const entries = {
    failed: report.failed.map((entry) => `${entry.kind} ${entry.name} (${entry.id}): ${entry.code}: ${entry.reason}`),
    asImages: report.asImages.map(
      (entry) => `snapshot ${entry.snapshotName} of ${entry.volumeId} as image ${entry.name} (${entry.id})`,
    ),
    uncertain: report.uncertain.map((entry) => `${entry.kind} ${entry.name} (${entry.id})`),
    damages: report.damages.map((entry) => `${entry.record}: ${entry.message}`),
  }
  for (const [list, meaning] of Object.entries(listsOfImport)) {
    const found = entries[list as keyof typeof entries]
    if (found.length > 0) lines.push(`${meaning}:`, ...found.map((entry) => `  ${entry}`))
  }
  const { length } = report.unknownLayers
  if (length > 0)
    lines.push(`${length} layers in the pool that nothing refers to are left alone: ${report.unknownLayers.join(', ')}`)
  if (report.missingReaders.length > 0) {
    const names = report.missingReaders.map((pool) => `${pool.name} (${pool.driver}, ${pool.id})`).join(', ')
    lines.push(`nothing of it is freed until the pools that read from it are imported, too, or given up: ${names}`)
  }
  return [...lines, ...report.notes].join('\n')
}

/** What of the newer state is given up: what is named in each list, and what it means. */
const listsOfAcceptance = {
  onlyInExport: 'not in this catalog: given up',
  changed: 'newer in the pool: given up, and what this catalog has of it is refused (CATALOG_BEHIND)',
  deleted: 'deleted in the newer state: refused (CATALOG_BEHIND), since what it held may be gone',
} as const

function acceptText(report: PoolAcceptDocument): string {
  const time = report.exportedAt === null ? '' : ` of ${report.exportedAt}`
  const lines = [
    report.accepted
      ? `this catalog counts for pool ${report.name}; the newer state${time} is given up`
      : `nothing was changed; with --yes the newer state${time} of pool ${report.name} is given up for good`,
  ]
  for (const [list, meaning] of Object.entries(listsOfAcceptance)) {
    const rows = report[list as keyof typeof listsOfAcceptance]
    if (rows.length > 0) lines.push(`${meaning}:`, ...rows.map(({ kind, id, name }) => `  ${kind} ${name} (${id})`))
  }
  for (const pool of report.missingReaders)
    lines.push(`pool ${pool.name} (${pool.id}), which read from it, is not here: given up`)
  for (const pool of report.missingSources)
    lines.push(`pool ${pool.name} (${pool.id}), which it read from, is not here: given up`)
  if (report.damages.length > 0) {
    const damages = report.damages.map(({ record, message }) => `  ${record}: ${message}`)
    lines.push('damaged or missing in the export, so there may be more:', ...damages)
  }
  const { length } = report.unknownLayers
  if (length > 0)
    lines.push(`${length} layers that this catalog does not know are left alone: ${report.unknownLayers.join(', ')}`)
  return lines.join('\n')
}

export interface PoolFinding {
  readonly severity: 'note' | 'warning' | 'error'
  readonly kind: string
  readonly object: string
  readonly message: string
}

export interface PoolCheck {
  readonly findings: readonly PoolFinding[]
}

function collect(value: string, before: string[]): string[] {
  if (!value.includes('=')) throw usageError(`--option ${value}: write KEY=VALUE or KEY=@FILE`)
  return [...before, value]
}

function readSettings(pairs: readonly string[]): Record<string, string> {
  const settings: Record<string, string> = {}
  for (const pair of pairs) {
    const end = pair.indexOf('=')
    if (end <= 0) throw usageError(`${pair}: write KEY=VALUE`)
    settings[pair.slice(0, end)] = pair.slice(end + 1)
  }
  return settings
}

function poolState(pool: PoolDocument): string {
  const conditions = pool.health?.conditions.map(({ kind }) => kind) ?? []
  const draining = pool.draining === null ? [] : ['draining']
  if (pool.error !== null) return [pool.error.code, ...conditions, ...draining].join(', ')
  const states = [
    ...new Set([...conditions, ...draining, ...(pool.lowSpace ? ['low space'] : []), ...(pool.slow ? ['slow'] : [])]),
  ]
  return states.length === 0 ? 'ok' : states.join(', ')
}

function poolText(pool: PoolDocument): string {
  return formatFields([
    ['id', pool.id],
    ['name', pool.name],
    ['driver', pool.driver],
    ...Object.entries(pool.options).map(([name, value]) => [`option ${name}`, value] as const),
    ...Object.entries(pool.settings).map(([name, value]) => [`setting ${name}`, value] as const),
    ['state', poolState(pool)],
    ...(pool.health?.conditions.map(({ kind, message }) => [kind, message] as const) ?? []),
    ['total', formatBytes(pool.totalBytes)],
    [
      'free',
      `${formatBytes(pool.freeBytes)}${pool.lowSpaceBytes > 0 ? `, the alarm is below ${formatBytes(pool.lowSpaceBytes)}` : ''}`,
    ],
    ['reserve', formatBytes(pool.reserveBytes)],
    [
      'provisioned',
      `${formatBytes(pool.provisionedBytes)}${pool.provisionedMaxBytes === null ? '' : ` of ${formatBytes(pool.provisionedMaxBytes)}`}`,
    ],
    ['stored', formatBytes(pool.storedBytes)],
    ['logical', formatBytes(pool.logicalBytes)],
    ['dedup ratio', pool.dedupRatio.toFixed(2)],
    ['layers', String(pool.layers)],
    ['draining', pool.draining === null ? null : moveText(pool.draining)],
    ['read by', pool.readBy.map((name) => (pool.missingReaders.includes(name) ? `${name} (not here)` : name)).join(', ')],
    ...Object.entries(pool.capabilities ?? {}).map(([name, value]) => [name, value === null ? null : String(value)] as const),
    ['export', pool.export === null ? null : exportText(pool.export)],
    ...(pool.error === null ? [] : [['error', `${pool.error.code}: ${pool.error.message}`] as const]),
  ])
}

function exportText({ state, behindSince, error }: NonNullable<PoolDocument['export']>): string {
  if (state === 'ahead') return 'ahead: it is of a newer catalog than this one, and is left as it is (see atoll pool accept)'
  if (state === 'current') return 'current'
  return `behind since ${behindSince ?? 'now'}${error === null ? '' : `: ${error.code}: ${error.message}`}`
}

function checkText(check: PoolCheck): string {
  if (check.findings.length === 0) return 'nothing found'
  return check.findings.map((finding) => `${finding.severity}: ${finding.object}: ${finding.message}`).join('\n')
}

function reclaimText(job: JobDocument): string {
  const result = (job.result ?? {}) as { freedBytes?: number; removedLayers?: number; sweptPages?: number }
  return `freed ${formatBytes(result.freedBytes ?? 0)}, removed ${result.removedLayers ?? 0} layers and ${result.sweptPages ?? 0} pages of maps`
}
