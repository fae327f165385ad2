import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtemp, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { sparseHeader } from '../sparse-frames.ts'
import { saveSparse } from './save-stream.ts'

let folder: string
let dest: string
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'atoll-save-'))
  dest = join(folder, 'out')
})
afterEach(async () => rm(folder, { recursive: true, force: true }))

async function* frames(...parts: Buffer[]): AsyncGenerator<Buffer> {
  yield* parts
}

test('a file that is there is replaced and keeps its mode', async () => {
  await writeFile(dest, 'old content', { mode: 0o600 })
  const seen: number[] = []
  const body = frames(sparseHeader(4, 3), Buffer.from('new'), sparseHeader(9, 0))
  await saveSparse(body, 9, { dest, onProgress: (progressBytes) => seen.push(progressBytes) })
  expect(await readFile(dest)).toEqual(Buffer.from('\0\0\0\0new\0\0'))
  expect((await stat(dest)).mode & 0o777).toBe(0o600)
  expect(seen).toEqual([7])
  await saveSparse(frames(sparseHeader(0, 0)), 0, { dest, onProgress: () => undefined })
  expect((await stat(dest)).size).toBe(0)
})

test('what breaks off leaves the old file and nothing else', async () => {
  await writeFile(dest, 'old')
  const body = frames(sparseHeader(0, 3), Buffer.from('ne'))
  await expect(saveSparse(body, 3, { dest, onProgress: () => undefined })).rejects.toMatchObject({ code: 'IO_ERROR' })
  expect(await readFile(dest, 'utf8')).toBe('old')
  expect(await readdir(folder)).toEqual(['out'])
})

// A command that is told to end waits for a part that never comes.
test.each(['SIGINT', 'SIGTERM', 'SIGHUP'] as const)(
  '%s leaves the old file and nothing else, and ends the process',
  async (signal) => {
    await writeFile(dest, 'old')
    const program = `
    import { saveSparse } from ${JSON.stringify(join(import.meta.dirname, 'save-stream.ts'))}
    import { sparseHeader } from ${JSON.stringify(join(import.meta.dirname, '..', 'sparse-frames.ts'))}
    async function* body() {
      yield sparseHeader(0, 3)
      yield Buffer.from('ne')
      process.stdout.write('written')
      await new Promise((resolve) => setTimeout(resolve, 2 ** 30))
    }
    await saveSparse(body(), 3, { dest: ${JSON.stringify(dest)}, onProgress: () => undefined })`
    const child = spawn(process.execPath, ['--input-type=module', '-e', program], { stdio: ['ignore', 'pipe', 'inherit'] })
    const ended = once(child, 'exit')
    await once(child.stdout, 'data')
    expect(await readdir(folder)).toHaveLength(2)
    child.kill(signal)
    expect(await ended).toEqual([null, signal])
    expect(await readFile(dest, 'utf8')).toBe('old')
    expect(await readdir(folder)).toEqual(['out'])
  },
)
