/** `node run-nbd-fuzz.ts [--seed N] [--minutes N]`: fuzzes the NBD socket of a real daemon (nbd-fuzz.ts); its report as JSON. */
import { parseArgs } from 'node:util'
import { fuzzNbd } from './nbd-fuzz.ts'

const { values } = parseArgs({
  options: { seed: { type: 'string' }, minutes: { type: 'string', default: '10' } },
})
const seed = Number(values.seed ?? Date.now() % 2 ** 32)
process.stderr.write(`seed ${seed}, ${values.minutes} minutes\n`)
const report = await fuzzNbd({
  seed,
  durationMs: Number(values.minutes) * 60_000,
  onProgress: (text) => process.stderr.write(`${text}\n`),
})
process.stdout.write(`${JSON.stringify(report, null, 2)}\n`)
