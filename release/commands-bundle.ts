/**
 * The short commands in one file of JavaScript (CommonJS): what a command costs is mostly the loading of its modules, and Node loads
 * an ES module at a higher price, since an `import` of a module of Node's evaluates all that it exports.
 *
 * `isFresh` of the file tells whether its sources are still those it was made of; `load` returns what cli/run.ts exports.
 */
import { statSync } from 'node:fs'
import { dirname, join, relative } from 'node:path'
import { rolldown, type Plugin } from 'rolldown'

export const repositoryRoot = join(import.meta.dirname, '..')

export interface CommandsBundle {
  readonly code: string
  /** Paths of what is in it. */
  readonly files: readonly string[]
}

/**
 * `folder` is where in the checkout the file will lie: it is fresh only as long as its sources, and this file, stay as they are. null: in
 * a release, where there are none, and it always is.
 * @throws Error what the bundler says
 */
export async function bundleCommands(folder: string | null): Promise<CommandsBundle> {
  const startedAtMs = Date.now()
  const bundle = await rolldown({
    cwd: repositoryRoot,
    input: 'cli/run.ts',
    platform: 'node',
    plugins: [onlyWhatIsShort(), whereItLies(folder)],
    onLog(level, log) {
      if (level === 'warn') throw new Error(`${log.code ?? ''} ${log.message}`)
    },
  })
  try {
    const { output } = await bundle.generate({ format: 'cjs', codeSplitting: false, exports: 'named' })
    const [chunk] = output
    const files = chunk.moduleIds.filter((id) => id.startsWith('/'))
    const stamps = folder === null ? {} : stampsOf(folder, [...files, import.meta.filename], startedAtMs)
    return { code: fileText(stamps, chunk.code), files }
  } finally {
    await bundle.close()
  }
}

/** What the daemon is made of stays out: start.cjs runs those commands from their sources. */
function onlyWhatIsShort(): Plugin {
  const spawner = '\0spawner'
  return {
    name: 'only-what-is-short',
    resolveId(id) {
      // Commander runs commands that are programs of their own with it; ours are not.
      return id === 'node:child_process' ? spawner : null
    },
    load(id) {
      if (id === spawner)
        return `export default { spawn: (...all) => process.getBuiltinModule('node:child_process').spawn(...all) }`
      if (id.startsWith(join(repositoryRoot, 'cli/daemon/'))) return `throw new Error('the daemon is not in this file')`
      return null
    },
  }
}

function whereItLies(folder: string | null): Plugin {
  return {
    name: 'where-it-lies',
    transform(code, id) {
      if (!code.includes('import.meta.dirname')) return null
      const path = JSON.stringify(folder === null ? '.' : relative(folder, dirname(id)))
      return code.replaceAll('import.meta.dirname', `process.getBuiltinModule('node:path').join(__dirname, ${path})`)
    },
  }
}

/** @throws Error if a file changed since `startedAtMs`: nobody knows which state of it was read */
function stampsOf(folder: string, files: readonly string[], startedAtMs: number): Record<string, string> {
  return Object.fromEntries(
    files.map((file) => {
      const { size, mtimeNs, ctimeNs, ctimeMs } = statSync(file, { bigint: true })
      if (Number(ctimeMs) >= startedAtMs - clockGrainMs) throw new Error(`${file} changes just now`)
      return [relative(folder, file), `${size} ${mtimeNs} ${ctimeNs}`]
    }),
  )
}

/** What a file system's clock may be behind. */
const clockGrainMs = 20

function fileText(stamps: Readonly<Record<string, string>>, code: string): string {
  return `'use strict'
exports.isFresh = () => {
  const { statSync } = process.getBuiltinModule('node:fs')
  return Object.entries(${JSON.stringify(stamps)}).every(([path, stamp]) => {
    const stat = statSync(__dirname + '/' + path, { bigint: true, throwIfNoEntry: false })
    return stat !== undefined && stat.size + ' ' + stat.mtimeNs + ' ' + stat.ctimeNs === stamp
  })
}
exports.load = () => {
const exports = {}
${code}
return exports
}
`
}
