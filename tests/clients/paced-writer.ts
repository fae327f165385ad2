import { BackgroundProcess } from './background-process.ts'
import { KiB } from './client-stand.ts'

const blockBytes = 64 * KiB
const blockCount = 400
/** Written before anybody disturbs the writer. */
const firstCount = 40
/** Written only when the disturbance is over. */
const lastCount = 40

/** qemu-io that fills the first 25 MiB of an export, a block at a time, and flushes at the end. */
export class PacedWriter {
  private readonly process: BackgroundProcess
  private output = ''
  private askedCount = 0
  /** So many may be asked for. */
  private allowedCount = 0

  constructor(uri: string) {
    // By lines: into a pipe it would say nothing before it has four kilobytes to say.
    this.process = new BackgroundProcess('stdbuf', ['-oL', 'qemu-io', '-f', 'raw', uri], {
      input: 'pipe',
      onOutput: (text) => {
        this.output += text
        this.goOn()
      },
    })
  }

  /** Returns while it writes: the first blocks are there, others are being written, and the last come when the disturbance is over. */
  async isUnderWay(): Promise<void> {
    this.allow(firstCount)
    await this.process.until('under way', () => this.written() >= firstCount)
    this.allow(blockCount - lastCount)
  }

  /** Lets it write the rest and waits for its end; fails unless every block and the flush were answered without an error. */
  async succeeds(): Promise<void> {
    this.allow(blockCount)
    await this.process.until('done', () => this.written() === blockCount || /fail|error/i.test(this.output))
    this.process.write('flush\n')
    this.process.closeInput()
    const code = await this.process.ended
    if (code !== 0 || this.written() !== blockCount || /fail|error/i.test(this.output)) {
      throw new Error(
        `qemu-io ended with ${code} after ${this.written()} blocks: ${this.process.errors}${this.output.slice(-1000)}`,
      )
    }
  }

  private allow(count: number): void {
    this.allowedCount = count
    this.goOn()
  }

  /** One command after the other: of several that come at once it does the first, and waits for more input. */
  private goOn(): void {
    if (this.askedCount >= this.allowedCount || this.written() < this.askedCount) return
    const block = this.askedCount
    this.askedCount += 1
    this.process.write(`write -P ${patternOf(block)} ${block * blockBytes} ${blockBytes}\n`)
  }

  /** `content` with the blocks that it writes. */
  over(content: Buffer): Buffer {
    const result = Buffer.from(content)
    for (let block = 0; block < blockCount; block++) result.fill(patternOf(block), block * blockBytes, (block + 1) * blockBytes)
    return result
  }

  private written(): number {
    return this.output.match(/\bwrote /g)?.length ?? 0
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.process[Symbol.asyncDispose]()
  }
}

function patternOf(block: number): number {
  return (block % 250) + 1
}
