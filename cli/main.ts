// The program as it stands in its sources; start.cjs says when a command is run from elsewhere.
import { run } from './run.ts'

await run(process.argv.slice(2))
