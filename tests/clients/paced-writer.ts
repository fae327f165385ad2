import { BackgroundProcess } from './background-process.ts'
import { KiB } from './client-stand.ts'

const blockBytes = 64 * KiB
/** Enough to be killed at work: with the pauses they take two seconds at least. */
const blockCount = 400
const pauseMs = 5

/** qemu-io that fills the first 25 MiB of an export, a block at a time with pauses, and flushes at the end. */
export class PacedWriter {
  private readonly process: BackgroundProcess
  private output = ''

  constructor(uri: string) {
    const commands = Array.from({ length: blockCount }, (_, block) => [
      '-c',
      `write -P ${patternOf(block)} ${block * blockBytes} ${blockBytes}`,
      '-c',
      `sleep ${pauseMs}`,
    ])
    this.process = new BackgroundProcess('qemu-io', ['-f', 'raw', ...commands.flat(), '-c', 'flush', uri], {
      onOutput: (text) => {
        this.output += text
      },
    })
  }

  /** Waits until a part of the blocks is written; fails if all are, since then nothing can happen to it any more. */
  async isUnderWay(): Promise<void> {
    await this.process.until('under way', () => this.written() >= blockCount / 10)
    if (this.written() === blockCount) throw new Error('the writer was too fast to be disturbed')
  }

  /** Waits for the end; fails unless every block and the flush were answered without an error. */
  async succeeds(): Promise<void> {
    const code = await this.process.ended
    if (code !== 0 || this.written() !== blockCount || /fail|error/i.test(this.output)) {
      throw new Error(
        `qemu-io ended with ${code} after ${this.written()} blocks: ${this.process.errors}${this.output.slice(-1000)}`,
      )
    }
  }

  /** `content` with the blocks that it writes. */
  over(content: Buffer): Buffer {
    const result = Buffer.from(content)
    for (let block = 0; block < blockCount; block++) result.fill(patternOf(block), block * blockBytes, (block + 1) * blockBytes)
    return result
  }

  private written(): number {
    return this.output.match(/^wrote /gm)?.length ?? 0
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.process[Symbol.asyncDispose]()
  }
}

function patternOf(block: number): number {
  return (block % 250) + 1
}
