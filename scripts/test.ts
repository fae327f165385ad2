// The test command: every static check, the Rust tests, the TypeScript tests, and a start of the real CLI. Runs all of
// them whatever fails, says what was skipped and why, and ends with one line of counts.
//
//   --checks  only what needs no running code: formats, lints, types, dependency direction
//   --crash   only the crash tests, at full size
//
// ATOLL_TEST_REQUIRE=all makes everything that was skipped a failure.
import { spawnSync } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { missingTools } from './test-tools.ts'

interface Counts {
  passed: number
  failed: number
  skipped: number
}

const root = join(import.meta.dirname, '..')
const bin = join(root, 'node_modules/.bin')
const requireAll = process.env['ATOLL_TEST_REQUIRE'] === 'all'
const total: Counts = { passed: 0, failed: 0, skipped: 0 }
const failures: string[] = []

interface Outcome {
  readonly ok: boolean
  readonly output: string
}

/** Runs a program in the root; `quiet` keeps its output for the case that it fails. */
function run(command: string, args: readonly string[], quiet: boolean, env: Record<string, string> = {}): Outcome {
  const result = spawnSync(command, args, {
    cwd: root,
    env: { ...process.env, ...env },
    stdio: ['ignore', quiet ? 'pipe' : 'inherit', quiet ? 'pipe' : 'inherit'],
    encoding: 'utf8',
    maxBuffer: 256 * 1024 * 1024,
  })
  const output = `${result.stdout ?? ''}${result.stderr ?? ''}`
  return { ok: result.status === 0, output: result.error === undefined ? output : `${output}${result.error.message}\n` }
}

function report(name: string, startedAt: number, ok: boolean): void {
  const seconds = ((performance.now() - startedAt) / 1000).toFixed(1)
  console.log(`${ok ? 'ok    ' : 'FAILED'} ${name} (${seconds} s)`)
  if (!ok) failures.push(name)
}

/** One check that either holds or not; `verbose`: what it prints is worth reading also when it holds. */
function check(name: string, command: string, args: readonly string[], verbose = false): void {
  const startedAt = performance.now()
  const { ok, output } = run(command, args, true)
  if (!ok || verbose) console.log(output.trimEnd())
  report(name, startedAt, ok)
  if (ok) total.passed += 1
  else total.failed += 1
}

function skip(name: string, reason: string): void {
  console.log(`${requireAll ? 'FAILED' : 'skip  '} ${name}: ${reason}`)
  if (requireAll) {
    total.failed += 1
    failures.push(`${name} (skipped)`)
  } else {
    total.skipped += 1
  }
}

/** `subcommand`: fmt, clippy; without one, cargo itself. */
function hasCargo(...subcommand: string[]): boolean {
  return run('cargo', [...subcommand, '--version'], true).ok
}

function staticChecks(): void {
  check('format (oxfmt)', join(bin, 'oxfmt'), ['--check'])
  check('lint (oxlint)', join(bin, 'oxlint'), ['--deny-warnings'])
  check('types (tsc)', join(bin, 'tsc'), ['--noEmit', '-p', '.'])
  check('dependency direction', process.execPath, ['scripts/check-dependencies.ts'])
  check('no ambient time, randomness or ids', process.execPath, ['scripts/check-ambient.ts'])
  const manifest = ['--manifest-path', 'native/Cargo.toml']
  if (hasCargo('fmt')) check('format (rustfmt)', 'cargo', ['fmt', ...manifest, '--all', '--check'])
  else skip('format (rustfmt)', 'rustfmt is not installed: rustup component add rustfmt')
  if (hasCargo('clippy')) {
    check('lint (clippy)', 'cargo', ['clippy', ...manifest, '--workspace', '--all-targets', '--quiet', '--', '-D', 'warnings'])
  } else {
    skip('lint (clippy)', 'clippy is not installed: rustup component add clippy')
  }
}

function rustTests(): void {
  if (!hasCargo()) {
    skip('Rust tests', 'cargo is not installed: https://rustup.rs')
    return
  }
  const startedAt = performance.now()
  const { ok, output } = run(
    'cargo',
    ['test', '--manifest-path', 'native/Cargo.toml', '--workspace', '--quiet', '--no-fail-fast'],
    true,
    // The same cases in every run: a run that fails can be run again. Longer ones choose their own (PROPTEST_CASES).
    { PROPTEST_RNG_SEED: process.env['PROPTEST_RNG_SEED'] ?? '20261121' },
  )
  const counts: Counts = { passed: 0, failed: 0, skipped: 0 }
  for (const line of output.matchAll(/^test result: .*? (\d+) passed; (\d+) failed; (\d+) ignored/gm)) {
    counts.passed += Number(line[1])
    counts.failed += Number(line[2])
    counts.skipped += Number(line[3])
  }
  if (!ok) {
    console.log(output.trimEnd())
    // A crate that does not compile fails without a single test.
    if (counts.failed === 0) counts.failed = 1
  }
  add(counts)
  report(`Rust tests: ${counts.passed} passed, ${counts.failed} failed`, startedAt, ok)
}

function typeScriptTests(filters: readonly string[], env: Record<string, string> = {}): void {
  const startedAt = performance.now()
  const folder = mkdtempSync(join(tmpdir(), 'atoll-test-'))
  const counts: Counts = { passed: 0, failed: 0, skipped: 0 }
  try {
    const file = join(folder, 'vitest.json')
    const args = ['run', '--reporter=default', '--reporter=json', `--outputFile.json=${file}`, ...filters]
    const { ok } = run(process.execPath, ['node_modules/vitest/vitest.mjs', ...args], false, env)
    readVitestReport(file, counts)
    // A file that cannot be loaded, or an error outside any test, fails the run without a failed test.
    if (!ok && counts.failed === 0) counts.failed = 1
  } finally {
    rmSync(folder, { recursive: true })
  }
  if (requireAll && counts.skipped > 0) {
    counts.failed += counts.skipped
    counts.skipped = 0
  }
  add(counts)
  report(`TypeScript tests: ${counts.passed} passed, ${counts.failed} failed`, startedAt, counts.failed === 0)
}

interface VitestReport {
  readonly testResults: readonly {
    readonly name: string
    readonly assertionResults: readonly { readonly status: string; readonly fullName: string }[]
  }[]
}

function readVitestReport(file: string, counts: Counts): void {
  let found: VitestReport
  try {
    found = JSON.parse(readFileSync(file, 'utf8')) as VitestReport
  } catch (error) {
    console.log(`vitest left no report: ${String(error)}`)
    counts.failed += 1
    return
  }
  for (const testFile of found.testResults) {
    for (const test of testFile.assertionResults) {
      if (test.status === 'passed') counts.passed += 1
      else if (test.status === 'failed') counts.failed += 1
      else {
        counts.skipped += 1
        console.log(`${requireAll ? 'FAILED' : 'skip  '} ${testFile.name.slice(root.length + 1)}: ${test.fullName}`)
      }
    }
  }
}

function add(counts: Counts): void {
  total.passed += counts.passed
  total.failed += counts.failed
  total.skipped += counts.skipped
}

const modes = process.argv.slice(2)
if (modes.includes('--crash')) {
  typeScriptTests(['.crash.test.ts', 'mapper/model.test.ts'], { ATOLL_TEST_CRASH: 'full', ATOLL_MODEL_CASES: '10000' })
} else if (modes.includes('--checks')) {
  staticChecks()
} else {
  for (const tool of missingTools()) {
    skip(
      tool.usedFor,
      `${tool.name.replace('python3:', 'the Python module ')} is not installed: apt-get install ${tool.debianPackage}`,
    )
  }
  staticChecks()
  check('the CLI runs as it is (type stripping)', process.execPath, ['scripts/smoke.ts'], true)
  rustTests()
  typeScriptTests([])
}

if (failures.length > 0) console.log(`\nfailed: ${failures.join('; ')}`)
console.log(`${total.passed} passed, ${total.failed} failed${total.skipped > 0 ? `, ${total.skipped} skipped` : ''}`)
process.exitCode = total.failed === 0 ? 0 : 1
