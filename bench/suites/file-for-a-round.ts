/** A peer whose disk is a file that is made for each round and removed after it. */
import { rmSync } from 'node:fs'
import type { Bench } from '../bench.ts'
import type { Contender } from '../contenders.ts'
import type { Server } from '../servers.ts'

export interface FileForARound {
  readonly name: string
  readonly kind: 'nbdkit' | 'qemu-nbd'
  readonly format: 'raw' | 'qcow2'
  /** Makes the file. */
  make(path: string): void
}

export function fileForARound(bench: Bench, { name, kind, format, make }: FileForARound): Contender {
  const path = bench.path(`${name.replaceAll(' ', '-')}.${format}`)
  let server: Server | undefined
  return {
    name,
    async prepare() {
      make(path)
      const served = await bench.serve(kind, path, format)
      server = served.server
      return served.uri
    },
    async finish() {
      if (server !== undefined) await bench.stop(server)
      rmSync(path)
    },
  }
}
