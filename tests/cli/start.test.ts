// How a short command starts: from one file made of its sources, as long as these are what it was made of.
import { cpSync, existsSync, mkdirSync, readdirSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { repositoryRoot, runProgram, succeed } from '../test-home.ts'

let root: string
let bundle: string

/** A checkout of its own, with what commands and their bundle are made of. */
beforeEach(async () => {
  root = await mkdtemp(join(tmpdir(), 'atoll-start-'))
  for (const path of ['atoll', 'cli', 'release', 'package.json']) {
    cpSync(join(repositoryRoot, path), join(root, path), {
      recursive: true,
      filter: (source) => !source.includes('node_modules'),
    })
  }
  const modules = join(repositoryRoot, 'node_modules')
  mkdirSync(join(root, 'node_modules'))
  for (const name of readdirSync(modules))
    if (!name.startsWith('.')) symlinkSync(join(modules, name), join(root, 'node_modules', name))
  bundle = join(root, 'node_modules/.cache/atoll/commands.cjs')
})

afterEach(async () => await rm(root, { recursive: true, force: true }))

/** As set-up does. One of sources that were written a moment ago is not made, because they could still change unseen. */
function makeBundle(version: string): void {
  while (!existsSync(bundle) || !readFileSync(bundle, 'utf8').includes(version)) {
    succeed('bundle-commands', runProgram(process.execPath, [join(root, 'release/bundle-commands.ts')]))
  }
}

const version = (): string => succeed('atoll --version', runProgram(join(root, 'atoll'), ['--version']))

/** So that it shows in what a command says where it was run from. */
function replaceVersion(path: string, from: string, to: string): void {
  const text = readFileSync(path, 'utf8')
  expect(text).toContain(from)
  writeFileSync(path, text.replaceAll(from, to))
}

test('a command is run from the bundle until one of its sources changes, and from a new one after the next set-up', () => {
  const present = version()
  expect(existsSync(bundle)).toBe(false)
  makeBundle(present)
  replaceVersion(bundle, present, '7.7.7')
  expect(version()).toBe('7.7.7')
  // As long as before: only the times tell.
  replaceVersion(join(root, 'cli/version.ts'), present, '8.8.8')
  expect(version()).toBe('8.8.8')
  makeBundle('8.8.8')
  replaceVersion(bundle, '8.8.8', '9.9.9')
  expect(version()).toBe('9.9.9')
})

test.each([
  ['empty', ''],
  ['cut off', 'exports.isFresh = () => tru'],
  ['zeros', '\0'.repeat(4096)],
])('a bundle that is no whole file (%s) is as none', (_, text) => {
  const present = version()
  mkdirSync(join(root, 'node_modules/.cache/atoll'), { recursive: true })
  writeFileSync(bundle, text)
  expect(version()).toBe(present)
})

test('a source that is gone is no reason to fail', () => {
  makeBundle(version())
  expect(runProgram(join(root, 'atoll'), ['snapshot', 'create', 'a@b', '--home', root])).toMatchObject({
    exitCode: 1,
    stderr: expect.stringContaining('DAEMON_NOT_RUNNING'),
  })
  rmSync(join(root, 'cli/commands/snapshot.ts'))
  expect(version()).toMatch(/^\d/)
  expect(runProgram(join(root, 'atoll'), ['snapshot', '--help']).stderr).toContain('snapshot.ts')
})
