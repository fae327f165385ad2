/** `node run-move-history.ts --seed N --operations N --draws N`: one history of moves, its report as JSON. */
import { parseArgs } from 'node:util'
import { runMoveHistory } from './move-history.ts'

const { values } = parseArgs({
  options: {
    seed: { type: 'string', default: '1' },
    operations: { type: 'string', default: '200' },
    draws: { type: 'string', default: '3' },
  },
})
const report = await runMoveHistory({
  seed: Number(values.seed),
  operationCount: Number(values.operations),
  drawsPerBoundary: Number(values.draws),
})
process.stdout.write(`${JSON.stringify(report)}\n`)
