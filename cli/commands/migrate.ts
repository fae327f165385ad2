import type { Command } from 'commander'
import { segment } from '../client/admin-client.ts'
import { contextOf, withExample } from './command-context.ts'
import { move, withMoveOptions, type MoveOptions } from './move.ts'

export function register(migrate: Command): void {
  withMoveOptions(migrate.argument('<volume>', 'name or id; it may be attached, and its clients notice nothing'))
    .option('--without-snapshots', 'leave its snapshots where they are')
    .action(async (name: string, options: MoveOptions & { withoutSnapshots?: boolean }) => {
      const more = { withSnapshots: options.withoutSnapshots !== true, project: contextOf(migrate).project }
      await move(migrate, `/v1/volumes/${segment(name)}/migrate`, `migrate ${name}`, options, more)
    })
  withExample(migrate, 'atoll migrate root --to fast --limit 100M --wait', 'atoll migrate root --to fast --dry-run')
}
