/**
 * `node run.ts [--only native|control-plane] [--name TEXT] [--sample N --seed N]`: plants each bug in a copy of the source, runs the tests that
 * must catch it, and prints which did. Exit 1 if a bug went unnoticed, or if the tests fail without any bug.
 */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { cp, mkdir, mkdtemp, readdir, rm, symlink } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { Random } from '../crash/random.ts'
import { controlPlaneBugs } from './control-plane-bugs.ts'
import { nativeBugs } from './native-bugs.ts'
import { plant, type PlantedBug } from './planted-bug.ts'

const checkout = fileURLToPath(new URL('../..', import.meta.url))
const { values } = parseArgs({
  options: {
    only: { type: 'string' },
    name: { type: 'string', default: '' },
    sample: { type: 'string', default: '1000' },
    seed: { type: 'string', default: '1' },
  },
})
/** For what ends by itself: a build, and tests without a bug, on however busy a machine. */
const soundTimeoutMs = 1_200_000
/** A test that hangs over a bug has caught it: when it has taken this many times what it takes without the bug, and a minute. */
const hangFactor = 3

interface Suite {
  readonly bugs: readonly PlantedBug[]
  /** Whether the tests pass in the tree at `root`. */
  passes(root: string, tests: readonly string[], timeoutMs: number): Promise<{ passed: boolean; output: string }>
}

const suites: Record<string, Suite> = {
  native: {
    bugs: nativeBugs,
    passes: async (root, tests, timeoutMs) => {
      // Shared by all bugs and all runs: only the crate with the bug is built anew.
      const env = { CARGO_TARGET_DIR: join(checkout, '.build/planted-bugs') }
      const args = ['--quiet', '--manifest-path', join(root, 'native/Cargo.toml')]
      // Built on its own, so that the time of the tests is theirs.
      const built = await run('cargo', ['test', '--no-run', ...args, ...tests.slice(0, 2)], env, soundTimeoutMs)
      return built.passed ? await run('cargo', ['test', ...args, ...tests], env, timeoutMs) : built
    },
  },
  'control-plane': {
    bugs: controlPlaneBugs,
    passes: (root, tests, timeoutMs) => {
      const isFile = tests[0]?.endsWith('.test.ts') === true
      const program = isFile ? ['node_modules/vitest/vitest.mjs', 'run', '--root', root] : ['tests/crash/run-history.ts']
      const [path = '', ...options] = program
      return run(process.execPath, [join(root, path), ...options, ...tests], {}, timeoutMs)
    },
  },
}

async function run(
  command: string,
  args: readonly string[],
  env: Record<string, string>,
  timeoutMs: number,
): Promise<{ passed: boolean; output: string }> {
  // A process group of its own: what hangs is the test program, a child of the child.
  const child = spawn(command, args, { env: { ...process.env, ...env }, stdio: ['ignore', 'pipe', 'pipe'], detached: true })
  const deadline = setTimeout(() => {
    if (child.pid !== undefined) process.kill(-child.pid, 'SIGKILL')
  }, timeoutMs)
  let output = ''
  for (const stream of [child.stdout, child.stderr]) {
    stream.on('data', (chunk: Buffer) => {
      output = (output + chunk.toString()).slice(-200_000)
    })
  }
  await once(child, 'close')
  clearTimeout(deadline)
  return { passed: child.exitCode === 0, output }
}

/** A sample of the bugs, the same for the same seed. */
function choose(bugs: readonly PlantedBug[]): PlantedBug[] {
  const random = new Random(Number(values.seed))
  const rest = [...bugs]
  const chosen: PlantedBug[] = []
  while (rest.length > 0 && chosen.length < Number(values.sample)) chosen.push(...rest.splice(random.below(rest.length), 1))
  return chosen
}

/** The first line that says what went wrong. */
function reason(output: string): string {
  const line = output.split('\n').find((text) => /assert|panicked|Error|error(\[|:)|FAILED|failed/.test(text))
  return (line ?? 'no answer in time').trim().slice(0, 160)
}

let unnoticed = 0
let caught = 0
for (const [suiteName, suite] of Object.entries(suites)) {
  if (values.only !== undefined && values.only !== suiteName) continue
  const root = await mkdtemp(join(tmpdir(), 'atoll-planted-bugs-'))
  try {
    for (const folder of ['core', 'southbound', 'mapper', 'composer', 'native', 'tests', 'package.json', 'vitest.config.ts']) {
      await cp(join(checkout, folder), join(root, folder), {
        recursive: true,
        filter: (path) => !/\/(target|node_modules)(\/|$)/.test(path),
      })
    }
    await symlinkPackages(root)
    const chosen = choose(suite.bugs.filter((bug) => bug.name.includes(values.name)))
    const timeouts = new Map<string, number>()
    for (const tests of new Set(chosen.map((bug) => bug.tests.join(' ')))) {
      const startedMs = performance.now()
      const sound = await suite.passes(root, tests.split(' '), soundTimeoutMs)
      timeouts.set(tests, 60_000 + hangFactor * (performance.now() - startedMs))
      if (!sound.passed) throw new Error(`the tests fail without any planted bug (${tests}):\n${sound.output}`)
    }
    for (const bug of chosen) {
      const takeBack = await plant(root, bug)
      const result = await suite.passes(root, bug.tests, timeouts.get(bug.tests.join(' ')) ?? soundTimeoutMs)
      await takeBack()
      // A bug that does not compile proves nothing; the others are tried all the same.
      if (/could not compile/.test(result.output)) {
        unnoticed++
        process.stdout.write(`BROKEN     ${bug.name}\n${result.output}\n`)
        continue
      }
      if (result.passed) unnoticed++
      else caught++
      process.stdout.write(
        `${result.passed ? 'UNNOTICED' : 'caught   '}  ${bug.name}${result.passed ? '' : `\n             ${reason(result.output)}`}\n`,
      )
    }
  } finally {
    await rm(root, { recursive: true, force: true })
  }
}
process.stdout.write(`planted bugs: ${caught} caught, ${unnoticed} unnoticed\n`)
process.exitCode = unnoticed > 0 ? 1 : 0

/** Our packages resolve to the copy, everything else to the checkout's. */
async function symlinkPackages(root: string): Promise<void> {
  const source = join(checkout, 'node_modules')
  const target = join(root, 'node_modules')
  await mkdir(join(target, '@atoll'), { recursive: true })
  for (const name of await readdir(source)) {
    if (name !== '@atoll') await symlink(join(source, name), join(target, name))
  }
  for (const [name, folder] of [
    ['core', 'core'],
    ['southbound', 'southbound'],
    ['mapper', 'mapper'],
    ['composer', 'composer'],
    ['native', 'native'],
    ['nbd-client', 'southbound/nbd/client'],
  ] as const) {
    await symlink(join(root, folder), join(target, '@atoll', name))
  }
}
