import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { repositoryRoot, runProgram } from '../test-home.ts'
import { hasPrograms } from './test-programs.ts'

/** The commands of the README's tour: its blocks that are marked `sh tour`, in order. */
function tourCommands(): string {
  const readme = readFileSync(join(repositoryRoot, 'README.md'), 'utf8')
  return [...readme.matchAll(/^```sh tour\n([^]*?)^```$/gm)].map((match) => match[1] ?? '').join('')
}

test.skipIf(!hasPrograms('qemu-io', 'nbdcopy', 'nbdinfo', 'mke2fs', 'dpkg-deb'))(
  'the tour of the README, pasted into a shell, ends as the README says',
  () => {
    const commands = tourCommands()
    // Ends whatever the tour had started when a step fails.
    const script = `set -euo pipefail\ntrap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n${commands}echo the tour is over\n`
    const tour = runProgram('bash', ['-c', script], { cwd: repositoryRoot })
    expect(tour.exitCode, `${tour.stdout}\n${tour.stderr}`).toBe(0)
    expect(tour.stdout).toContain('same as the image')
    expect(tour.stdout).toContain('the client noticed a pause only')
    expect(tour.stdout).toMatch(/the tour is over\n$/)
    expect(tour.stdout).not.toContain('Pattern verification failed')
  },
)
