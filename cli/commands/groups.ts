// Every command group, and the module that knows its commands: loaded only when one of them is run.
import type { Command } from 'commander'

export interface CommandGroup {
  readonly name: string
  readonly summary: string
  load(): Promise<{ register(command: Command): void }>
}

export const commandGroups: readonly CommandGroup[] = [
  { name: 'serve', summary: 'run the daemon', load: () => import('./serve.ts') },
  { name: 'status', summary: 'show whether the daemon runs, and what it has to do', load: () => import('./status.ts') },
  { name: 'top', summary: 'what attached volumes and their backends do right now', load: () => import('./top.ts') },
  { name: 'pool', summary: 'places where data lies', load: () => import('./pool.ts') },
  { name: 'volume', summary: 'block devices: create, attach, resize, delete', load: () => import('./volume.ts') },
  { name: 'migrate', summary: 'move a volume into another pool while it is used', load: () => import('./migrate.ts') },
  { name: 'snapshot', summary: 'points in time of volumes', load: () => import('./snapshot.ts') },
  { name: 'image', summary: 'read-only disks to make volumes from: import and export', load: () => import('./image.ts') },
  { name: 'file', summary: 'files in containers: put, get, list, delete', load: () => import('./file.ts') },
  { name: 'catalog', summary: 'back the catalog up, and put a backup in its place', load: () => import('./catalog.ts') },
  { name: 'check', summary: 'look over catalog and pools, and repair what can be', load: () => import('./check.ts') },
  { name: 'job', summary: 'long work in the daemon: list, pause, resume, cancel, limit', load: () => import('./job.ts') },
]
