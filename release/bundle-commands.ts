// Set-up's part: makes the file that cli/start.cjs runs short commands from, unless the one that is there is fresh. Without it the
// sources are run, so that nothing here is a reason to stop.
import { spawnSync } from 'node:child_process'
import { mkdirSync, renameSync, writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { join } from 'node:path'

const root = join(import.meta.dirname, '..')
const folder = join(root, 'node_modules', '.cache', 'atoll')
const path = join(folder, 'commands.cjs')

function isFresh(): boolean {
  try {
    return (createRequire(import.meta.url)(path) as { isFresh(): boolean }).isFresh()
  } catch {
    return false
  }
}

if (!isFresh()) {
  try {
    const { bundleCommands } = await import('./commands-bundle.ts')
    const { code } = await bundleCommands(folder)
    mkdirSync(folder, { recursive: true })
    // In one step: a command that starts meanwhile finds the old file or the new one whole.
    const partial = `${path}.${process.pid}`
    writeFileSync(partial, code)
    renameSync(partial, path)
    // One command that reaches no daemon: what it compiles is what most of them need, and Node's cache keeps that.
    spawnSync(process.execPath, [join(root, 'cli/start.cjs'), 'snapshot', 'create', 'a@b', '--home', folder], { stdio: 'ignore' })
  } catch (error) {
    console.error(`atoll: commands will start slower: ${error instanceof Error ? error.message : String(error)}`)
  }
}
