// Holds the direction of dependencies between packages (dependency-rules.ts), and that a package is entered through its
// `exports`, declares what it imports and leaves the addon to the engine's one door.
import { builtinModules } from 'node:module'
import { existsSync, readFileSync } from 'node:fs'
import { dirname, join, normalize } from 'node:path'
import { pathToFileURL } from 'node:url'
import { addonLoader, packageRules } from './dependency-rules.ts'
import { isTestFile, lineOf, readSourceFiles } from './source-files.ts'
import type { SourceFile } from './source-files.ts'

export interface Manifest {
  readonly name?: string
  readonly exports?: Readonly<Record<string, string>>
  readonly dependencies?: Readonly<Record<string, string>>
  readonly devDependencies?: Readonly<Record<string, string>>
}

export interface Tree {
  readonly files: readonly SourceFile[]
  /** package.json by folder; '' is the root's. */
  readonly manifests: Readonly<Record<string, Manifest>>
}

interface Import {
  readonly specifier: string
  readonly line: number
}

// Static imports and re-exports start a line; `import(…)` and `require(…)` may stand anywhere. A line that only talks
// about importing (a comment) does not match: it starts with `//` or `*`.
const staticImport = /^[ \t]*(?:import|export)\b(?:[^'"`;=(]*?\bfrom)?[ \t]*['"]([^'"\n]+)['"]/gm
const dynamicImport = /\b(?:import|require|require\.resolve)\(\s*['"]([^'"\n]+)['"]/g

/** The modules that a source text names, with their lines. */
export function importsOf(text: string): Import[] {
  const found: Import[] = []
  for (const pattern of [staticImport, dynamicImport]) {
    for (const match of text.matchAll(pattern)) {
      found.push({ specifier: match[1] ?? '', line: lineOf(text, match.index + match[0].length) })
    }
  }
  return found
}

/** The package that owns a path: the one with the deepest folder, since packages may lie inside others. */
function ownerOf(path: string): string | undefined {
  let owner: string | undefined
  let depth = -1
  for (const [name, rule] of Object.entries(packageRules)) {
    if (path.startsWith(`${rule.folder}/`) && rule.folder.length > depth) {
      owner = name
      depth = rule.folder.length
    }
  }
  return owner
}

function packageName(specifier: string): string {
  return specifier
    .split('/')
    .slice(0, specifier.startsWith('@') ? 2 : 1)
    .join('/')
}

function isBuiltin(specifier: string): boolean {
  return specifier.startsWith('node:') || builtinModules.includes(packageName(specifier))
}

function checkOurs(from: string, file: SourceFile, specifier: string, tree: Tree): string | undefined {
  const name = packageName(specifier)
  const rule = packageRules[from]
  const target = packageRules[name]
  if (rule === undefined || target === undefined) return undefined
  if (name === from) return `imports its own package as ${specifier}: use a relative path`
  // A package's tests may use every package below it and the NBD client, which is how a consumer looks at us.
  const allowed = isTestFile(file.path) ? [...rule.mayImport, ...belowOf(from), '@atoll/nbd-client'] : rule.mayImport
  if (!allowed.includes(name)) return `${from} may not import ${name}: ${rule.reason}`
  const entry = `.${specifier.slice(name.length)}`
  const exports = tree.manifests[target.folder]?.exports ?? {}
  if (!(entry in exports))
    return `${specifier} is not among the exports of ${name}: a package is entered through its exports only`
  return undefined
}

function belowOf(name: string, seen = new Set<string>()): string[] {
  for (const below of packageRules[name]?.mayImport ?? []) {
    if (!seen.has(below)) {
      seen.add(below)
      belowOf(below, seen)
    }
  }
  return [...seen]
}

function checkDeclared(from: string | undefined, file: SourceFile, specifier: string, tree: Tree): string | undefined {
  const name = packageName(specifier)
  const folder = from === undefined ? '' : (packageRules[from]?.folder ?? '')
  const own = tree.manifests[folder] ?? {}
  const declared = new Set(Object.keys(own.dependencies ?? {}))
  if (isTestFile(file.path) || from === undefined) {
    for (const manifest of [own, tree.manifests[''] ?? {}]) {
      for (const dependency of Object.keys(manifest.devDependencies ?? {})) declared.add(dependency)
    }
  }
  if (declared.has(name)) return undefined
  return `imports ${name}, which ${folder === '' ? 'package.json' : `${folder}/package.json`} does not declare: add it to its dependencies`
}

function checkImport(file: SourceFile, specifier: string, tree: Tree): string | undefined {
  const from = ownerOf(file.path)
  if (specifier.startsWith('.')) {
    const target = normalize(join(dirname(file.path), specifier))
    if (ownerOf(target) === from) return undefined
    return `relative import of ${target}, another package's inside: import the package by its name`
  }
  if (isBuiltin(specifier)) return specifier.startsWith('node:') ? undefined : `write node:${specifier} for Node's own modules`
  if (packageName(specifier) in packageRules) {
    const violation = from === undefined ? undefined : checkOurs(from, file, specifier, tree)
    if (violation !== undefined) return violation
    if (from === packageName(specifier)) return undefined
  }
  return checkDeclared(from, file, specifier, tree)
}

const addonLoads = /process\.dlopen|\bcreateRequire\b|['"`][^'"`\n]*\.node['"`]/g

/** One sentence per violation, each starting with `path:line: `; empty when everything holds. */
export function findViolations(tree: Tree): string[] {
  const violations: string[] = []
  for (const file of tree.files) {
    for (const { specifier, line } of importsOf(file.text)) {
      const violation = checkImport(file, specifier, tree)
      if (violation !== undefined) violations.push(`${file.path}:${line}: ${violation}`)
    }
    // What is packed is copied, not loaded.
    if (file.path === addonLoader || /^(?:scripts|release)\//.test(file.path)) continue
    for (const match of file.text.matchAll(addonLoads)) {
      // A test may load what another package has, to break it; never the addon past its door.
      if (match[0] === 'createRequire' && isTestFile(file.path)) continue
      violations.push(
        `${file.path}:${lineOf(file.text, match.index)}: loads compiled code (${match[0]}): only ${addonLoader} may, so that there is one door to the engine`,
      )
    }
  }
  return violations
}

/** The test of this check is full of what it looks for. */
const plantedViolations = 'scripts/check-dependencies.test.ts'

/** Reads the sources and manifests below `root`. */
export function readTree(root: string): Tree {
  const manifests: Record<string, Manifest> = {}
  for (const folder of ['', ...Object.values(packageRules).map((rule) => rule.folder)]) {
    const path = join(root, folder, 'package.json')
    if (existsSync(path)) manifests[folder] = JSON.parse(readFileSync(path, 'utf8')) as Manifest
  }
  return { files: readSourceFiles(root).filter(({ path }) => path !== plantedViolations), manifests }
}

if (import.meta.url === pathToFileURL(process.argv[1] ?? '').href) {
  const violations = findViolations(readTree(join(import.meta.dirname, '..')))
  for (const violation of violations) console.error(violation)
  process.exitCode = violations.length === 0 ? 0 : 1
}
