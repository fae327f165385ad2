import { connect } from 'node:net'
import type { Socket } from 'node:net'
import { createInterface } from 'node:readline'

interface QmpMessage {
  readonly QMP?: object
  readonly event?: string
  readonly data?: Record<string, unknown>
  readonly return?: unknown
  readonly error?: { readonly desc: string }
}

/** A connection to QEMU's monitor: one command at a time, and the events seen so far. */
export class Qmp {
  readonly events: QmpMessage[] = []
  private readonly socket: Socket
  private readonly answers: ((message: QmpMessage) => void)[] = []
  private readonly closed: Promise<void>

  private constructor(socket: Socket) {
    this.socket = socket
    const closed = Promise.withResolvers<void>()
    this.closed = closed.promise
    socket.once('close', () => {
      closed.resolve()
      for (const answer of this.answers.splice(0)) answer({ error: { desc: 'the monitor is gone' } })
    })
    socket.on('error', () => {})
    const lines = createInterface({ input: socket })
    // It passes on the socket's errors: a QEMU that quits may reset the connection.
    lines.on('error', () => {})
    lines.on('line', (line) => {
      const message = JSON.parse(line) as QmpMessage
      if (message.QMP !== undefined) return
      if (message.event === undefined) this.answers.shift()?.(message)
      else this.events.push(message)
    })
  }

  static async connect(path: string): Promise<Qmp> {
    const socket = connect(path)
    await new Promise<void>((resolve, reject) => {
      socket.once('connect', resolve)
      socket.once('error', reject)
    })
    const qmp = new Qmp(socket)
    await qmp.run('qmp_capabilities')
    return qmp
  }

  /** Runs a command; fails with QEMU's own words. */
  async run<T = unknown>(command: string, parameters: Record<string, unknown> = {}): Promise<T> {
    const answer = await new Promise<QmpMessage>((resolve) => {
      this.answers.push(resolve)
      this.socket.write(`${JSON.stringify({ execute: command, arguments: parameters })}\n`)
    })
    if (answer.error !== undefined) throw new Error(`QEMU refused ${command}: ${answer.error.desc}`)
    return answer.return as T
  }

  async close(): Promise<void> {
    this.socket.destroy()
    await this.closed
  }
}
