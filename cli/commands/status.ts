import type { Command } from 'commander'
import type { StandbyDocument, StatusDocument } from '../admin-types.ts'
import { formatBytes, formatSeconds } from '../terminal/format-bytes.ts'
import { formatFields } from '../terminal/table.ts'
import { contextOf, withExample } from './command-context.ts'

export function register(status: Command): void {
  status.action(async () => {
    const context = contextOf(status)
    const document = await context.client.get<StatusDocument | StandbyDocument>('/v1/status')
    context.print(document, () => (document.standby === null ? statusText(document) : standbyText(document)))
  })
  withExample(status, 'atoll status')
}

function standbyText(status: StandbyDocument): string {
  return formatFields([
    ['status', 'standby'],
    ['active', status.standby.active],
    ['catalog', status.standby.catalog],
    ['version', status.version],
    ['pid', String(status.pid)],
    ['home', status.home],
    ['http', status.http],
    ['uptime', formatSeconds(status.uptimeSeconds)],
  ])
}

function statusText(status: StatusDocument): string {
  return formatFields([
    ['status', 'ready'],
    ['version', status.version],
    ['pid', String(status.pid)],
    ['home', status.home],
    ['http', status.http],
    ['nbd socket', status.nbdSocket],
    ['nbd', status.nbd],
    ['uptime', formatSeconds(status.uptimeSeconds)],
    ['pools', String(status.pools)],
    ['volumes', `${status.volumes}, ${status.attachedVolumes} attached`],
    ['connections', String(status.connections)],
    ...(status.lowSpacePools.length === 0 ? [] : [['low space', status.lowSpacePools.join(', ')] as const]),
    ...status.troubledPools.map(({ name, conditions }) => [`pool ${name}`, conditions.join(', ')] as const),
    ['running jobs', String(status.runningJobs)],
    ['waiting reads', [status.waitingReads.path, status.waitingReads.reason].filter((text) => text !== null).join(': ')],
    ['memory', `${formatBytes(status.residentBytes)}, maps ${formatBytes(status.mapBytes)}`],
  ])
}
