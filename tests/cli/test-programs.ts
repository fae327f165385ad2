import { spawnSync } from 'node:child_process'

/** Whether every one of the programs is installed. Where one is missing its tests are skipped, and `npm test` says so. */
export function hasPrograms(...names: string[]): boolean {
  const env = { ...process.env, PATH: `${process.env['PATH'] ?? ''}:/usr/sbin:/sbin` }
  return names.every((name) => spawnSync('sh', ['-c', 'command -v -- "$1"', 'sh', name], { env }).status === 0)
}
