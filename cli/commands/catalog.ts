import { resolve } from 'node:path'
import type { Command } from 'commander'
import type { BackupDocument, RestoreDocument } from '../admin-types.ts'
import { resolveHome } from '../client/home.ts'
import { formatBytes } from '../terminal/format-bytes.ts'
import { formatFields } from '../terminal/table.ts'
import { contextOf, withExample, type GlobalOptions } from './command-context.ts'

export function register(catalog: Command): void {
  withExample(
    catalog
      .command('backup')
      .description('write the catalog as it is now to a new file; everything goes on meanwhile')
      .argument('<dest>', 'path of a file that is not there yet')
      .action(async (dest: string, _options: unknown, command: Command) => {
        const context = contextOf(command)
        const document = await context.client.post<BackupDocument>('/v1/catalog/backup', { path: resolve(dest) })
        context.print(document, () => backupText(document))
      }),
    'atoll catalog backup /backup/atoll-catalog-today',
  )
  withExample(
    catalog
      .command('restore')
      .description('put a backup in the place of the catalog; the daemon must not run')
      .argument('<source>', 'path of a backup')
      .option('--catalog <path>', 'file of the catalog (default: catalog.db in the home)')
      .action(async (source: string, options: { catalog?: string }, command: Command) => {
        const context = contextOf(command)
        // Only this command needs more than a socket: there is no daemon to ask.
        const { restoreHome } = await import('../daemon/restore-home.ts')
        const document: RestoreDocument = await restoreHome({
          home: resolveHome(command.optsWithGlobals<GlobalOptions>().home),
          source: resolve(source),
          settings: { catalog: options.catalog === undefined ? undefined : resolve(options.catalog) },
        })
        context.print(document, () => restoreText(document))
      }),
    'atoll catalog restore /backup/atoll-catalog-today',
  )
}

function backupText(backup: BackupDocument): string {
  return formatFields([
    ['backup', backup.path],
    ['generation', String(backup.generation)],
    ['size', formatBytes(backup.imageBytes)],
    ['sha256', backup.sha256],
  ])
}

function restoreText(restored: RestoreDocument): string {
  return `${formatFields([
    ['catalog', restored.catalogId],
    ['as of', restored.createdAt],
    ['generation', String(restored.generation)],
    ['kept', restored.replacedPath],
  ])}
What was made or written since is not in it: start the daemon and run 'atoll check'.`
}
