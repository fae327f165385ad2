/**
 * Runs qemu-img on bytes that nobody trusts.
 *
 * Rules:
 * - qemu-img gets one file at most, as descriptor 3: for an export the one that it writes, for an import its source if its user
 *   may read that anyway. Everything else are exports of ours on one unix socket, in a directory that only its user may enter.
 * - It runs without network, privileges, capabilities and environment; memory, processor time and the size of files that it
 *   writes are limited, and it dies with the daemon.
 * - As root we run it as nobody; as anybody else we run it as ourselves in a user namespace of its own, which is what takes
 *   the network away. Where that is refused, qemu-img is not run at all.
 * - The driver is always named; qemu-img never probes.
 */
import { spawn } from 'node:child_process'
import { readFileSync } from 'node:fs'
import { access, chmod, chown, constants, mkdtemp, rm } from 'node:fs/promises'
import { delimiter, join } from 'node:path'
import { AtollError, type JsonObject } from '@atoll/core'
import { JobInterrupted } from './job-kind.ts'
import type { SetTimer } from './timers.ts'

/** User and group nobody of Debian. */
export const sandboxUserId = 65_534
export const sandboxGroupId = 65_534

/** qemu-img's address space: its caches are bounded, what a hostile image asks for is not. */
const addressSpaceBytesMax = 2 * 2 ** 30
const outputBytesMax = 64 * 2 ** 10
const openFilesMax = 64
const processorSecondsBase = 60
/** Slower than any decompression on any machine. */
const bytesPerProcessorSecond = 4 * 2 ** 20

/** Under this name qemu-img finds the file that it gets. */
export const descriptorPath = '/proc/self/fd/3'

/** The programs that confine it: util-linux, which every Debian has. */
const confiningPrograms = ['unshare', 'setpriv', 'prlimit'] as const

/** A directory that the confined program may enter, and nobody else but us. */
export interface SandboxDirectory {
  path: string
  /** The group that sockets in it are to belong to; null: ours. */
  groupId: number | null
  remove(): Promise<void>
}

export interface QemuImgRun {
  arguments: readonly string[]
  /** Bytes that are read or written at most: bounds the processor time. */
  workBytesMax: number
  signal: AbortSignal
  setTimer: SetTimer
  /** A number that changes as long as something moves. */
  activity: () => number
  /** qemu-img is ended when nothing has moved for so long. */
  stallTimeoutMs: number
  /** A file that is handed over as descriptor 3, and how large it may become. Default: no file can be written. */
  outputFile?: { descriptor: number; sizeBytesMax: number }
  /** A file that is handed over as descriptor 3 for reading; what is read of it counts as activity. Not with `outputFile`. */
  inputFile?: { descriptor: number }
  /** Called with each percentage that `-p` prints. */
  onPercent?: (percent: number) => void
}

/** Makes a `SandboxDirectory`. The path is short, because a socket's name has at most 107 bytes. */
export async function makeSandboxDirectory(parentPath: string): Promise<SandboxDirectory> {
  const path = await mkdtemp(join(parentPath, 'atoll-convert-'))
  const remove = async (): Promise<void> => rm(path, { recursive: true, force: true })
  try {
    if (!isRoot()) return { path, groupId: null, remove }
    await chmod(path, 0o710)
    await chown(path, 0, sandboxGroupId)
    return { path, groupId: sandboxGroupId, remove }
  } catch (error) {
    await remove()
    throw error
  }
}

/**
 * Finds qemu-img and what confines it.
 * @throws AtollError QEMU_IMG_MISSING, SANDBOX_UNAVAILABLE naming the package
 */
export async function requireQemuImg(pathVariable = process.env['PATH'] ?? ''): Promise<string> {
  const qemuImg = await findProgram('qemu-img', pathVariable)
  if (qemuImg === null) {
    throw new AtollError('QEMU_IMG_MISSING', 'qemu-img is not installed: install the Debian package qemu-utils', {
      values: { package: 'qemu-utils' },
    })
  }
  for (const program of confiningPrograms) {
    if ((await findProgram(program, pathVariable)) !== null) continue
    throw new AtollError('SANDBOX_UNAVAILABLE', `${program} is not installed: install the Debian package util-linux`, {
      values: { package: 'util-linux' },
    })
  }
  return qemuImg
}

/**
 * Runs qemu-img, confined, and returns what it printed (at most the last `outputBytesMax` bytes).
 * @throws AtollError QEMU_IMG_MISSING, SANDBOX_UNAVAILABLE, IMAGE_CONVERT_FAILED with the last line it printed
 * @throws JobInterrupted the signal was aborted; the process is gone then
 */
export async function runQemuImg(run: QemuImgRun): Promise<string> {
  const qemuImg = await requireQemuImg()
  // Asked here: nothing is awaited from here until the listener is there.
  if (run.signal.aborted) throw new JobInterrupted()
  const [program, ...programArguments] = [...confinement(run), qemuImg, ...run.arguments]
  const pipes = ['ignore', 'pipe', 'pipe'] as const
  const file = run.outputFile ?? run.inputFile
  const child = spawn(program ?? '', programArguments, {
    cwd: '/',
    env: { PATH: process.env['PATH'] ?? '/usr/bin:/bin', LC_ALL: 'C' },
    stdio: file === undefined ? [...pipes] : [...pipes, file.descriptor],
  })
  const output = { stdout: '', stderr: '' }
  child.stdout?.setEncoding('latin1').on('data', (text: string) => {
    output.stdout = (output.stdout + text).slice(-outputBytesMax)
    const percent = lastPercent(output.stdout)
    if (percent !== null) run.onPercent?.(percent)
  })
  child.stderr?.setEncoding('latin1').on('data', (text: string) => {
    output.stderr = (output.stderr + text).slice(-outputBytesMax)
  })
  const kill = (): void => void child.kill('SIGKILL')
  run.signal.addEventListener('abort', kill, { once: true })
  const watch = watchForStall(run, () => run.activity() + (run.inputFile === undefined ? 0 : readBytesOf(child.pid)), kill)
  try {
    const ended = Promise.withResolvers<{ code: number | null; signal: string | null }>()
    child.once('error', ended.reject)
    child.once('close', (code, signal) => ended.resolve({ code, signal }))
    const { code, signal } = await ended.promise
    if (run.signal.aborted) throw new JobInterrupted()
    if (watch.stalled()) {
      throw new AtollError(
        'IMAGE_CONVERT_FAILED',
        `qemu-img ${run.arguments[0]} moved nothing for ${run.stallTimeoutMs / 1000} s and was ended`,
        {
          values: { command: run.arguments[0] ?? '', timeoutMs: run.stallTimeoutMs },
        },
      )
    }
    if (code === 0) return output.stdout
    throw failure(run.arguments[0] ?? '', code, signal, output.stderr)
  } finally {
    run.signal.removeEventListener('abort', kill)
    watch.stop()
  }
}

/** Bytes that a process has read of anything; 0 where that is not told. */
function readBytesOf(processId: number | undefined): number {
  try {
    return Number(/^rchar: (\d+)$/m.exec(readFileSync(`/proc/${processId}/io`, 'latin1'))?.[1] ?? 0)
  } catch {
    return 0
  }
}

/** Ends the process when nothing moves between two looks. */
function watchForStall(run: QemuImgRun, activity: () => number, kill: () => void): { stalled(): boolean; stop(): void } {
  let stalled = false
  let before = activity()
  const look = (): void => {
    const now = activity()
    if (now === before) {
      stalled = true
      kill()
      return
    }
    before = now
    cancel = run.setTimer(look, run.stallTimeoutMs)
  }
  let cancel = run.setTimer(look, run.stallTimeoutMs)
  return { stalled: () => stalled, stop: () => cancel() }
}

/** A driver of QEMU that an image is opened with. */
export type QemuDriver = 'raw' | 'qcow2' | 'vmdk' | 'vdi' | 'vhdx' | 'vpc'

/**
 * The `json:` name of an export for qemu-img, so that no separator in a path has a meaning. A backing file is never opened,
 * even if the inspection overlooked one.
 */
export function nbdImageName(driver: QemuDriver, socketPath: string, exportName: string): string {
  return imageName(driver, { driver: 'nbd', server: { type: 'unix', path: socketPath }, export: exportName })
}

/** The same for the file that qemu-img gets as descriptor 3. */
export function descriptorImageName(driver: QemuDriver): string {
  return imageName(driver, { driver: 'file', filename: descriptorPath, locking: 'off' })
}

function imageName(driver: QemuDriver, file: JsonObject): string {
  // The size that we inspected, not the one of the disk's geometry.
  const size = driver === 'vpc' ? { force_size_calc: 'current_size' } : {}
  return `json:${JSON.stringify({ driver, ...size, ...(driver === 'raw' ? {} : { backing: null }), file })}`
}

/** Each program of the chain replaces itself with the next, so that the one process is qemu-img in the end. */
function confinement({ workBytesMax, outputFile }: QemuImgRun): string[] {
  const processorSeconds = processorSecondsBase + Math.ceil(workBytesMax / bytesPerProcessorSecond)
  const isolation = isRoot() ? ['--net', '--ipc'] : ['--user', '--map-current-user', '--net', '--ipc']
  const user = ['--reuid', String(sandboxUserId), '--regid', String(sandboxGroupId), '--clear-groups']
  const noCapabilities = ['--inh-caps=-all', '--ambient-caps=-all', '--bounding-set=-all']
  const privileges = [...(isRoot() ? [...user, ...noCapabilities] : []), '--no-new-privs', '--pdeathsig', 'KILL']
  const limits = [
    `--as=${addressSpaceBytesMax}`,
    `--cpu=${processorSeconds}`,
    `--nofile=${openFilesMax}`,
    `--fsize=${outputFile?.sizeBytesMax ?? 0}`,
    '--core=0',
  ]
  return ['unshare', ...isolation, '--', 'setpriv', ...privileges, '--', 'prlimit', ...limits, '--']
}

function failure(command: string, code: number | null, signal: string | null, stderr: string): AtollError {
  const lastLine = stderr.trim().split('\n').at(-1) ?? ''
  if (/^(unshare|setpriv|prlimit):/.test(lastLine)) {
    return new AtollError('SANDBOX_UNAVAILABLE', `qemu-img cannot be confined on this machine: ${lastLine}`, {
      values: { message: lastLine },
    })
  }
  const how = signal === null ? `ended with ${code}` : `was ended by ${signal}`
  return new AtollError('IMAGE_CONVERT_FAILED', `qemu-img ${command} ${how}: ${lastLine}`, {
    values: { command, message: lastLine },
  })
}

/** `-p` prints "    (12.34/100%)\r" again and again. */
function lastPercent(text: string): number | null {
  const match = [...text.slice(-256).matchAll(/\((\d+(?:\.\d+)?)\/100%\)/g)].at(-1)
  return match === undefined ? null : Number(match[1])
}

async function findProgram(name: string, pathVariable: string): Promise<string | null> {
  for (const directory of pathVariable.split(delimiter)) {
    if (!directory.startsWith('/')) continue
    const path = join(directory, name)
    try {
      await access(path, constants.X_OK)
      return path
    } catch {
      // Not in this directory.
    }
  }
  return null
}

/** Whether the confined user may open a file of ours with this mode, given its descriptor. Access lists may still say no. */
export function mayReadInSandbox(mode: number): boolean {
  return !isRoot() || (mode & constants.S_IROTH) !== 0
}

function isRoot(): boolean {
  return process.geteuid?.() === 0
}
