/** What a suite works with: its folder, the servers it started, and where its rows go. */
import { execFileSync } from 'node:child_process'
import { mkdirSync } from 'node:fs'
import { join } from 'node:path'
import { compare, type Comparison, type Contender } from './contenders.ts'
import type { FioTarget } from './fio.ts'
import { Atoll, missing, type Server, socketUri, startNbdkit, startQemuNbd } from './servers.ts'
import { figureLine, rowLine, type Document, type Figure, type Row } from './table.ts'

export const MiB = 2 ** 20
export const GiB = 2 ** 30

export interface Peer {
  readonly contender: Contender
  readonly target: number | null
}

export class Bench {
  readonly folder: string
  readonly seconds: number
  readonly #document: Document
  readonly #print: (line: string) => void
  readonly #servers = new Set<{ stop(): Promise<void> }>()
  #socketCount = 0

  constructor(folder: string, document: Document, print: (line: string) => void) {
    this.folder = folder
    this.seconds = document.seconds
    this.#document = document
    this.#print = print
  }

  get rounds(): number {
    return this.#document.rounds
  }

  path(name: string): string {
    return join(this.folder, name)
  }

  async atoll(): Promise<Atoll> {
    mkdirSync(this.path('home'), { recursive: true, mode: 0o700 })
    const atoll = await Atoll.start(this.path('home'))
    this.#servers.add(atoll)
    return atoll
  }

  /** Serves a file; the URI of its disk. */
  async serve(
    kind: 'nbdkit' | 'qemu-nbd',
    path: string,
    format: 'raw' | 'qcow2' = 'raw',
  ): Promise<{ uri: string; server: Server }> {
    const socket = this.path(`${(this.#socketCount += 1)}.sock`)
    const server = kind === 'nbdkit' ? await startNbdkit(path, socket) : await startQemuNbd(path, format, socket)
    this.#servers.add(server)
    return { uri: socketUri(socket), server }
  }

  async stop(server: Server): Promise<void> {
    await server.stop()
    this.#servers.delete(server)
  }

  /** Whether a program is there; one that is not is listed as skipped. */
  has(program: string, debianPackage: string): boolean {
    const reason = missing(program, debianPackage)
    if (reason !== null && !this.#document.skipped.includes(reason)) this.#document.skipped.push(reason)
    return reason === null
  }

  /** Says what was not measured, and why. */
  skip(reason: string): void {
    this.#document.skipped.push(reason)
  }

  async compare(comparison: Comparison): Promise<void> {
    for (const row of await compare(comparison, this.rounds)) this.row(row)
  }

  row(row: Row): void {
    this.#document.rows.push(row)
    this.#print(rowLine(row))
  }

  /** Ends with the run. */
  add<T extends { stop(): Promise<void> }>(server: T): T {
    this.#servers.add(server)
    return server
  }

  figure(figure: Figure): void {
    this.#document.figures.push(figure)
    this.#print(figureLine(figure))
  }

  /** A raw file of incompressible bytes. */
  makeContent(path: string, sizeBytes: number): void {
    execFileSync('dd', ['if=/dev/urandom', `of=${path}`, 'bs=4M', `count=${sizeBytes / (4 * MiB)}`, 'status=none'])
  }

  async close(): Promise<void> {
    for (const server of [...this.#servers].toReversed()) await server.stop()
    this.#servers.clear()
  }
}

/** A disk that stays as it is from round to round. */
export function standing(name: string, target: FioTarget): Contender {
  return { name, prepare: () => Promise.resolve(target) }
}
