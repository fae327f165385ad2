import type { Command } from 'commander'
import type { CheckDocument, JobDocument } from '../admin-types.ts'
import { contextOf, withExample } from './command-context.ts'
import { waitForJob } from './wait-for-job.ts'

export function register(check: Command): void {
  check
    .option('--repair', 'put right what can be without losing anything; everything else is left and told')
    .option('--deep', 'look into every layer for space that nothing refers to, too')
    .action(async (options: { repair?: true; deep?: true }) => {
      const context = contextOf(check)
      const wanted = { repair: options.repair === true, deep: options.deep === true }
      const job = await waitForJob(context, await context.client.post<JobDocument>('/v1/check', wanted), 'check')
      const document = job.result as unknown as CheckDocument
      context.print(document, () => checkText(document))
      if (document.errors > 0) process.exitCode = 1
    })
  withExample(check, 'atoll check', 'atoll check --repair')
}

function checkText(check: CheckDocument): string {
  const lines = check.findings.map(({ severity, kind, object, message, repair, repairable }) => {
    const end = repair === null ? (repairable ? ' (atoll check --repair)' : '') : ` REPAIRED: ${repair}`
    return `${severity}: ${kind}: ${object}: ${message}${end}`
  })
  if (check.more > 0) lines.push(`… and ${check.more} more`)
  const { errors, warnings, notes, repaired } = check
  lines.push(`${errors} errors, ${warnings} warnings, ${notes} notes${repaired > 0 ? `, ${repaired} repaired` : ''}`)
  return lines.join('\n')
}
