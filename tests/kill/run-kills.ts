/** `node run-kills.ts --seed N --kills N [--dir DIR]`: kills the real daemon N times under load; its report as JSON. */
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { runKills } from './kills.ts'

const { values } = parseArgs({
  options: {
    seed: { type: 'string', default: '1' },
    kills: { type: 'string', default: '10' },
    dir: { type: 'string', default: tmpdir() },
  },
})
const home = await mkdtemp(join(values.dir, 'atoll-kills-'))
try {
  const report = await runKills({
    home,
    seed: Number(values.seed),
    killCount: Number(values.kills),
    onProgress: (text) => process.stderr.write(`${text}\n`),
  })
  process.stdout.write(`${JSON.stringify(report)}\n`)
} finally {
  await rm(home, { recursive: true, force: true })
}
