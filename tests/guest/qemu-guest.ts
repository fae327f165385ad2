// A virtual machine whose disk is one of ours: QEMU as a process, its serial console as text.
import { writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { BackgroundProcess } from '../clients/background-process.ts'
import { Qmp } from './qmp.ts'

const keptConsoleCharacters = 4_000
const resultLine = /^RESULT rc=(\d+)\n/m

export interface GuestOptions {
  /** Names the files of this guest in `folder`. */
  readonly name: string
  readonly folder: string
  /** What the guest runs (`guest-init.sh` says how). */
  readonly script: string
  /** Arguments that give it its disk and, where it needs one, a network. */
  readonly devices: readonly string[]
  /** Takes over the guest of another QEMU through this unix socket instead of booting. */
  readonly incoming?: string
}

/** The disk of a guest: the output of `atoll volume attach --format qemu`, as it is. */
export function bootDisk(blockdev: string): string[] {
  const { 'node-name': nodeName } = JSON.parse(blockdev) as { 'node-name': string }
  return ['-blockdev', blockdev, '-device', `virtio-blk-pci,drive=${nodeName},bootindex=0`]
}

/** QEMU's user network: the guest reaches what listens on this machine's 127.0.0.1 under 10.0.2.2. */
export const userNetwork: readonly string[] = [
  '-netdev',
  'user,id=net0,restrict=off',
  '-device',
  'virtio-net-pci,netdev=net0,romfile=',
]

// /dev/kvm may open and still run a foreign kernel at a crawl, so it is never asked for. A disk that does not boot ends QEMU
// instead of leaving the BIOS waiting.
const machine: readonly string[] = `-accel tcg -M q35 -cpu max,la57=off,migratable=on -m 256 -nodefaults -no-user-config
  -display none -serial stdio -no-reboot -boot reboot-timeout=1 -device virtio-rng-pci`.split(/\s+/)

/** A running guest. `await using` kills it. */
export class QemuGuest {
  /** Everything on the serial console so far. */
  console = ''
  private readonly process: BackgroundProcess
  private readonly monitorPath: string
  private readonly name: string

  private constructor(options: GuestOptions, scriptPath: string) {
    this.name = options.name
    this.monitorPath = join(options.folder, `${options.name}.qmp`)
    this.process = new BackgroundProcess(
      'qemu-system-x86_64',
      [
        ...machine,
        '-qmp',
        `unix:${this.monitorPath},server=on,wait=off`,
        '-fw_cfg',
        `name=opt/atoll/script,file=${scriptPath}`,
        ...options.devices,
        ...(options.incoming === undefined ? [] : ['-incoming', `unix:${options.incoming}`]),
      ],
      {
        input: 'pipe',
        onOutput: (text) => {
          this.console += text.replaceAll('\r', '')
        },
      },
    )
  }

  static async start(options: GuestOptions): Promise<QemuGuest> {
    const scriptPath = join(options.folder, `${options.name}.sh`)
    await writeFile(scriptPath, options.script)
    return new QemuGuest(options, scriptPath)
  }

  /** What the script said with this word in front, oldest first. */
  said(word: string): string[] {
    // Only whole lines: the last one may still be under way.
    return [...this.console.matchAll(new RegExp(`^SAY ${word} (.*)\\n`, 'gm'))].map((match) => match[1] ?? '')
  }

  /**
   * Waits until `condition` holds. Fails, with the end of the console, once it no longer can: QEMU or the script has ended, or the
   * script says `trouble`.
   */
  async until(what: string, condition: () => boolean | Promise<boolean>): Promise<void> {
    try {
      await this.process.until(what, async () => {
        if (await condition()) return true
        const [trouble] = this.said('trouble')
        if (trouble !== undefined) throw new Error(`trouble ${trouble}`)
        if (resultLine.test(this.console)) throw new Error(`the script ended before the guest ${what}`)
        return false
      })
    } catch (error) {
      throw new Error(`guest ${this.name}: ${(error as Error).message}\n${this.console.slice(-keptConsoleCharacters)}`, {
        cause: error,
      })
    }
  }

  /** Waits until the script has said this word so many times; returns what it said the last of these times. */
  async hear(word: string, count = 1): Promise<string> {
    await this.until(`said ${word} ${count} times`, () => this.said(word).length >= count)
    return this.said(word)[count - 1] ?? ''
  }

  /** Lets a script that stands at `wait_for_host word` go on. */
  tell(word: string): void {
    this.process.write(`${word}\n`)
  }

  /** Waits for the end of the script and of QEMU; fails unless the script ended with 0. */
  async succeeds(): Promise<void> {
    await this.until('reported a result', () => resultLine.test(this.console))
    const code = resultLine.exec(this.console)?.[1]
    if (code !== '0') {
      throw new Error(`guest ${this.name}: the script ended with ${code}\n${this.console.slice(-keptConsoleCharacters)}`)
    }
    await this.process.ended
  }

  async monitor(): Promise<Qmp> {
    const connected: Qmp[] = []
    await this.process.until('its monitor answers', async () => {
      try {
        connected.push(await Qmp.connect(this.monitorPath))
        return true
      } catch {
        return false
      }
    })
    const [qmp] = connected
    if (qmp === undefined) throw new Error('unreachable')
    return qmp
  }

  /** Waits until QEMU has ended by itself. */
  async ended(): Promise<void> {
    await this.process.ended
  }

  /** Ends QEMU at once, as a power cut of the machine does. */
  async kill(): Promise<void> {
    await this.process.end('SIGKILL')
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.kill()
  }
}

interface MigrationState {
  readonly status: string
  /** Milliseconds, once it is completed. */
  readonly downtime?: number
  readonly 'total-time'?: number
  readonly ram?: { readonly transferred: number }
  readonly 'error-desc'?: string
}

export interface Migration {
  readonly totalMs: number
  readonly downtimeMs: number
  readonly movedBytes: number
}

/** Moves a running guest into `target`, which waits on the socket `path`, and ends the QEMU it came from. */
export async function migrate(source: QemuGuest, target: QemuGuest, path: string): Promise<Migration> {
  // The target listens once its monitor answers.
  const targetMonitor = await target.monitor()
  const monitor = await source.monitor()
  await monitor.run('migrate-set-parameters', { 'max-bandwidth': 1024 ** 3 })
  await monitor.run('migrate', { uri: `unix:${path}` })
  let state = await monitor.run<MigrationState>('query-migrate')
  await target.until('taken over', async () => {
    state = await monitor.run<MigrationState>('query-migrate')
    if (state.status === 'failed') throw new Error(`the migration failed: ${state['error-desc']}`)
    return state.status === 'completed'
  })
  // QEMU may be gone before it has answered.
  await monitor.run('quit').catch(() => {})
  await source.ended()
  await monitor.close()
  await targetMonitor.close()
  return { totalMs: state['total-time'] ?? 0, downtimeMs: state.downtime ?? 0, movedBytes: state.ram?.transferred ?? 0 }
}
