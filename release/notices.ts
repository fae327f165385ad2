/** The licences of what a release carries along: a file that goes into each package. */
import { execFileSync } from 'node:child_process'
import { existsSync, readdirSync, readFileSync } from 'node:fs'
import { dirname, join } from 'node:path'

interface Part {
  readonly name: string
  readonly licence: string
  readonly folder: string
}

interface CargoMetadata {
  readonly packages: readonly {
    readonly id: string
    readonly name: string
    readonly version: string
    readonly license: string | null
    readonly manifest_path: string
    readonly source: string | null
  }[]
  readonly resolve: { readonly nodes: readonly { readonly id: string; readonly deps: readonly CargoDependency[] }[] }
  readonly workspace_members: readonly string[]
}

interface CargoDependency {
  readonly pkg: string
  /** null: a normal one; else "dev" or "build". */
  readonly dep_kinds: readonly { readonly kind: string | null }[]
}

const licenceFile = /^(?:licen[cs]e|copying|notice|unlicense)/i
/** What may not be linked in (our own licence is Apache-2.0). */
const forbidden = /\b(?:A?GPL|SSPL|BUSL)/

/**
 * The notices of the crates that the addon is linked from.
 * @throws Error naming a crate whose licence may not be linked in, or that has none
 */
export function crateNotices(nativeFolder: string): string {
  const target = `${process.arch === 'arm64' ? 'aarch64' : 'x86_64'}-unknown-linux-gnu`
  const args = [
    'metadata',
    '--format-version',
    '1',
    '--locked',
    '--filter-platform',
    target,
    '--manifest-path',
    join(nativeFolder, 'Cargo.toml'),
  ]
  const metadata = JSON.parse(
    execFileSync('cargo', args, { encoding: 'utf8', maxBuffer: 2 ** 28, stdio: ['ignore', 'pipe', 'ignore'] }),
  ) as CargoMetadata
  const linked = linkedCrates(metadata)
  const parts = metadata.packages
    .filter(({ id, source }) => source !== null && linked.has(id))
    .map((crate) => ({
      name: `${crate.name} ${crate.version}`,
      licence: crate.license ?? '',
      folder: dirname(crate.manifest_path),
    }))
  return noticesOf(parts)
}

/**
 * The notices of the npm packages that these files belong to.
 * @throws Error as `crateNotices`
 */
export function packageNotices(files: Iterable<string>): string {
  const folders = new Set<string>()
  for (const file of files) {
    const folder = /^.*\/node_modules\/(?:@[^/]+\/)?[^/]+/.exec(file)?.[0]
    if (folder !== undefined) folders.add(folder)
  }
  const parts = [...folders].map((folder): Part => {
    const manifest = JSON.parse(readFileSync(join(folder, 'package.json'), 'utf8')) as {
      name: string
      version: string
      license?: string
    }
    return { name: `${manifest.name} ${manifest.version}`, licence: manifest.license ?? '', folder }
  })
  return noticesOf(parts)
}

/** Everything that normal dependencies lead to from the workspace; what only builds or tests is not linked. */
function linkedCrates(metadata: CargoMetadata): Set<string> {
  const nodes = new Map(metadata.resolve.nodes.map((node) => [node.id, node]))
  const found = new Set<string>(metadata.workspace_members)
  for (const id of found) {
    for (const { pkg, dep_kinds: kinds } of nodes.get(id)?.deps ?? []) {
      if (kinds.some(({ kind }) => kind === null)) found.add(pkg)
    }
  }
  return found
}

function noticesOf(parts: readonly Part[]): string {
  const sections = parts
    .toSorted((a, b) => (a.name < b.name ? -1 : 1))
    .map(({ name, licence, folder }) => {
      // Of "A OR B" one that fits is enough.
      if (licence === '' || licence.split(/\s+OR\s+|\//).every((choice) => forbidden.test(choice)))
        throw new Error(`${name} has the licence "${licence}", which may not be part of a release`)
      const files = existsSync(folder) ? readdirSync(folder).filter((file) => licenceFile.test(file)) : []
      const texts = files.map((file) => readFileSync(join(folder, file), 'utf8').trim())
      return [`${name} (${licence})`, ...texts].join('\n\n')
    })
  return `${sections.join(`\n\n${'-'.repeat(78)}\n\n`)}\n`
}
