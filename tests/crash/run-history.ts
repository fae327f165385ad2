/** `node run-history.ts --seed N --operations N --draws N [--part I --parts N] [--from N] [--files]`: one history, its report as JSON. */
import { parseArgs } from 'node:util'
import { runHistory } from './history.ts'

const { values } = parseArgs({
  options: {
    seed: { type: 'string', default: '1' },
    operations: { type: 'string', default: '1000' },
    draws: { type: 'string', default: '4' },
    part: { type: 'string', default: '0' },
    parts: { type: 'string', default: '1' },
    from: { type: 'string', default: '0' },
    files: { type: 'boolean', default: false },
  },
})
const report = await runHistory({
  seed: Number(values.seed),
  operationCount: Number(values.operations),
  drawsPerBoundary: Number(values.draws),
  part: Number(values.part),
  parts: Number(values.parts),
  fromOperation: Number(values.from),
  files: values.files,
  onProgress: ({ operations, boundaries, states }) =>
    process.stderr.write(`${operations} operations, ${boundaries} boundaries, ${states} states\n`),
})
process.stdout.write(`${JSON.stringify(report)}\n`)
