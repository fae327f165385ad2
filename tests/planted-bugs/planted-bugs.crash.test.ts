/**
 * Bugs planted in copies of the source must be caught. Every run plants a few of each kind, chosen by the seed; all of them
 * with ATOLL_TEST_CRASH=full.
 */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { controlPlaneBugs } from './control-plane-bugs.ts'
import { nativeBugs } from './native-bugs.ts'

const full = process.env['ATOLL_TEST_CRASH'] === 'full'
const seed = process.env['ATOLL_SEED'] ?? '20261121'

test.each([...nativeBugs, ...controlPlaneBugs])('there is a place to plant: $name', async ({ edits }) => {
  for (const edit of edits) {
    const text = await readFile(join(import.meta.dirname, '../..', edit.file), 'utf8')
    expect(text.split(edit.find).length - 1, `${edit.file}: ${edit.find}`).toBe(1)
  }
})

test.each(['native', 'control-plane'])(
  'planted bugs are caught: %s',
  async (suite) => {
    const args = [join(import.meta.dirname, 'run.ts'), '--only', suite, ...(full ? [] : ['--sample', '3', '--seed', seed])]
    const child = spawn(process.execPath, args, { stdio: ['ignore', 'pipe', 'inherit'] })
    let output = ''
    child.stdout.on('data', (chunk: Buffer) => {
      output += chunk.toString()
    })
    await once(child, 'close')
    console.log(output)
    expect(output).toMatch(/planted bugs: \d+ caught, 0 unnoticed/)
    expect(child.exitCode).toBe(0)
  },
  full ? 6 * 3_600_000 : 2 * 3_600_000,
)
