/**
 * Makes the packages of a release: `atoll`, the bundled JavaScript with its launcher, and `atoll-native-linux-<arch>`, the
 * addon for this machine. Node takes no TypeScript from under node_modules, and the workspaces are private; so everything of
 * ours is bundled, and only what brings binaries of its own (better-sqlite3, the pinned Node) stays a dependency.
 */
import { chmodSync, copyFileSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { rolldown, type Plugin } from 'rolldown'
import { bundleCommands, repositoryRoot } from './commands-bundle.ts'
import { crateNotices, packageNotices } from './notices.ts'

/** Packages with binaries: not bundled, but installed beside the bundle. */
const external = ['better-sqlite3']

const noticesFile = 'THIRD-PARTY-NOTICES'

interface Manifest {
  readonly version: string
  readonly dependencies?: Readonly<Record<string, string>>
  readonly optionalDependencies?: Readonly<Record<string, string>>
}

export interface Release {
  readonly version: string
  /** Folders that `npm pack` takes. */
  readonly packageFolders: readonly string[]
}

/**
 * Writes the packages into `folder`, which is empty.
 * @throws Error if the addon is not built, a source names a file in a way that the bundle would lose, or a part's licence does
 * not allow it
 */
export async function buildRelease(folder: string): Promise<Release> {
  const root = readManifest('package.json')
  const bundle = join(folder, 'atoll')
  const native = join(folder, nativePackageName(process.arch))
  const library = join(bundle, 'lib/atoll')
  const bundledFiles = await writeBundle(library)
  const { code, files } = await bundleCommands(null)
  for (const file of files) bundledFiles.add(file)
  writeFileSync(join(library, 'commands.cjs'), code)
  copyFileSync(join(import.meta.dirname, 'start.cjs'), join(library, 'start.cjs'))
  writeFileSync(join(bundle, noticesFile), packageNotices(bundledFiles))
  mkdirSync(join(bundle, 'bin'))
  copyFileSync(join(import.meta.dirname, 'launcher.sh'), join(bundle, 'bin/atoll'))
  chmodSync(join(bundle, 'bin/atoll'), 0o755)
  writeManifest(bundle, {
    name: 'atoll',
    version: root.version,
    description: 'A storage virtualization layer: files, images, volumes and snapshots over one pool of copy-on-write data',
    license: 'Apache-2.0',
    type: 'module',
    os: ['linux'],
    bin: { atoll: 'bin/atoll' },
    dependencies: pick(readManifest('core/package.json').dependencies ?? {}, external),
    optionalDependencies: {
      ...root.optionalDependencies,
      [nativePackageName('x64')]: root.version,
      [nativePackageName('arm64')]: root.version,
    },
  })

  mkdirSync(native)
  copyFileSync(join(repositoryRoot, `native/atoll.linux-${process.arch}.node`), join(native, 'atoll.node'))
  writeFileSync(join(native, noticesFile), crateNotices(join(repositoryRoot, 'native')))
  writeManifest(native, {
    name: nativePackageName(process.arch),
    version: root.version,
    description: 'The native engine of Atoll',
    license: 'Apache-2.0',
    os: ['linux'],
    cpu: [process.arch],
    main: 'atoll.node',
  })
  for (const packageFolder of [bundle, native]) {
    for (const file of ['LICENSE', 'README.md']) copyFileSync(join(repositoryRoot, file), join(packageFolder, file))
  }
  return { version: root.version, packageFolders: [native, bundle] }
}

function nativePackageName(arch: string): string {
  return `atoll-native-linux-${arch}`
}

/** Returns the files that are in it. */
async function writeBundle(folder: string): Promise<Set<string>> {
  const threads = threadFiles()
  const bundle = await rolldown({
    cwd: repositoryRoot,
    input: { main: 'cli/main.ts', ...threads.entries },
    platform: 'node',
    external,
    plugins: [threads.plugin],
    onLog(level, log) {
      // A warning of the bundler is a mistake of ours, or one that we would only learn of at run time.
      if (level === 'warn') throw new Error(`${log.code ?? ''} ${log.message}`)
    },
  })
  try {
    const { output } = await bundle.write({
      dir: folder,
      format: 'esm',
      entryFileNames: '[name].js',
      chunkFileNames: '[name]-[hash].js',
    })
    return new Set(output.flatMap((file) => (file.type === 'chunk' ? file.moduleIds : [])))
  } finally {
    await bundle.close()
  }
}

/** Files that are started by their URL: each becomes a file of the bundle, and the URL names that. */
function threadFiles(): { entries: Record<string, string>; plugin: Plugin } {
  const files = ['core/catalog/wal-checkpoint-worker.ts', 'core/catalog/catalog-task-worker.ts']
  const nameOf = (path: string): string => (path.split('/').pop() ?? path).replace(/\.ts$/, '')
  const entries = Object.fromEntries(files.map((path) => [nameOf(path), path]))
  const plugin: Plugin = {
    name: 'thread-files',
    transform(code, id) {
      if (id.includes('node_modules')) return null
      return code.replaceAll(/new URL\('(?:\.\/)?([^'`]+)\.ts', import\.meta\.url\)/g, (_, path: string) => {
        const name = nameOf(path)
        if (entries[name] === undefined)
          throw new Error(`${id} starts ${path}.ts, which is not in the list of ${import.meta.filename}`)
        return `new URL('./${name}.js', import.meta.url)`
      })
    },
  }
  return { entries, plugin }
}

function readManifest(path: string): Manifest {
  return JSON.parse(readFileSync(join(repositoryRoot, path), 'utf8')) as Manifest
}

function writeManifest(folder: string, manifest: object): void {
  writeFileSync(join(folder, 'package.json'), `${JSON.stringify(manifest, null, 2)}\n`)
}

function pick(versions: Readonly<Record<string, string>>, names: readonly string[]): Record<string, string> {
  return Object.fromEntries(
    names.map((name) => {
      const version = versions[name]
      if (version === undefined) throw new Error(`core/package.json does not depend on ${name}`)
      return [name, version]
    }),
  )
}
