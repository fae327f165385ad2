// `npm run pack:check`: packs a release, installs it in a folder outside the checkout, and uses it there as a user would.
import { execFileSync, spawn, type ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { Worker } from 'node:worker_threads'
import { connect } from '@atoll/nbd-client'
import { buildRelease } from './build-release.ts'
import { repositoryRoot } from './commands-bundle.ts'

const readyTimeoutMs = 300_000
const folder = mkdtempSync(join(tmpdir(), 'atoll-release-'))
const home = join(folder, 'home')
const installed = join(folder, 'installed')
let daemon: ChildProcess | undefined

/** Runs the installed command in its folder; what it prints. */
function atoll(...args: string[]): string {
  const env = { ...process.env, ATOLL_HOME: home }
  return execFileSync(join(installed, 'node_modules/.bin/atoll'), args, { cwd: installed, env, encoding: 'utf8' }).trim()
}

function npm(cwd: string, ...args: string[]): string {
  return execFileSync('npm', args, { cwd, encoding: 'utf8', stdio: ['ignore', 'pipe', 'inherit'] })
}

function install(packageFolders: readonly string[]): void {
  const archives = packageFolders.map((path) => {
    const [packed] = JSON.parse(npm(path, 'pack', '--json', '--pack-destination', folder)) as { filename: string }[]
    if (packed === undefined) throw new Error(`npm packed nothing of ${path}`)
    return join(folder, packed.filename)
  })
  mkdirSync(installed)
  writeFileSync(join(installed, 'package.json'), '{ "private": true }\n')
  npm(installed, 'install', '--ignore-scripts', '--no-audit', '--no-fund', '--loglevel=error', ...archives)
}

/** The thread that folds the catalog's log is a file of its own, which a short life of the daemon does not start. */
async function checkThread(): Promise<void> {
  const path = join(installed, 'node_modules/atoll/lib/atoll/wal-checkpoint-worker.js')
  const thread = new Worker(path, { workerData: { path: join(home, 'catalog.db') } })
  const answered = once(thread, 'message', { signal: AbortSignal.timeout(readyTimeoutMs) })
  thread.postMessage('checkpoint')
  const [answer] = (await answered) as [{ logFrames?: number }]
  await thread.terminate()
  if (typeof answer.logFrames !== 'number') throw new Error(`the thread answered ${JSON.stringify(answer)}`)
}

/** Nothing of the machine that packed it stands in what users get. */
function checkPaths(): void {
  for (const name of readdirSync(join(installed, 'node_modules/atoll'), { recursive: true, encoding: 'utf8' })) {
    const path = join(installed, 'node_modules/atoll', name)
    if (statSync(path).isFile() && readFileSync(path, 'utf8').includes(repositoryRoot))
      throw new Error(`${name} names the folder it was packed in`)
  }
}

async function start(): Promise<void> {
  const started = spawn(join(installed, 'node_modules/.bin/atoll'), ['serve', '--json', '--http', ':0', '--home', home], {
    cwd: installed,
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  daemon = started
  const timer = setTimeout(() => started.kill('SIGKILL'), readyTimeoutMs)
  let ready: { ready?: boolean; pid?: number } | undefined
  for await (const line of createInterface({ input: started.stdout })) {
    ready = JSON.parse(line) as { ready?: boolean; pid?: number }
    break
  }
  clearTimeout(timer)
  if (ready?.ready !== true || ready.pid !== started.pid) throw new Error(`it did not become ready: ${JSON.stringify(ready)}`)
}

async function stop(): Promise<void> {
  if (daemon === undefined || daemon.exitCode !== null || daemon.signalCode !== null) return
  const ended = once(daemon, 'exit')
  daemon.kill('SIGTERM')
  await ended
  if (daemon.exitCode !== 0) throw new Error(`the daemon ended with ${daemon.exitCode ?? daemon.signalCode} after SIGTERM`)
}

async function useVolume(): Promise<void> {
  atoll('volume', 'create', 'disk', '--size', '64G')
  atoll('snapshot', 'create', 'disk@empty')
  const client = await connect(atoll('volume', 'attach', 'disk', '--format', 'uri'))
  const block = Buffer.alloc(4096, 0x5a)
  for (let leaf = 0; leaf < 64; leaf += 1) await client.write(leaf * 2 ** 30, block)
  await client.flush()
  atoll('snapshot', 'create', 'disk@full')
  atoll('volume', 'create', 'copy', '--from', 'snapshot:disk@full')
  await client.disconnect()
  const copy = await connect(atoll('volume', 'attach', 'copy', '--format', 'uri'))
  if (!block.equals(await copy.read(63 * 2 ** 30, 4096))) throw new Error('a clone read other bytes than were written')
  await copy.disconnect()
}

try {
  const release = await buildRelease(folder)
  install(release.packageFolders)
  checkPaths()
  const version = atoll('--version')
  if (version !== release.version) throw new Error(`it says version ${version}, not ${release.version}`)
  await start()
  await useVolume()
  await stop()
  await start()
  const { status } = JSON.parse(atoll('volume', 'show', 'copy', '--json')) as { status: string }
  if (status !== 'in-use') throw new Error(`after a restart the attached volume is ${status}`)
  await stop()
  await checkThread()
  console.log(`the release ${version} installs and runs outside the checkout`)
} finally {
  daemon?.kill('SIGKILL')
  rmSync(folder, { recursive: true, force: true })
}
