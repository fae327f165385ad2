import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { makeTemporaryFolder } from './catalog/testing.ts'
import { takeProcessLock } from './process-lock.ts'

let path: string
let remove: () => Promise<void>

beforeEach(async () => {
  const made = await makeTemporaryFolder()
  path = join(made.folder, 'home.lock')
  remove = made.remove
})

afterEach(() => remove())

function take(owner: string): { release(): void } {
  const taken = takeProcessLock(path, owner)
  if ('lock' in taken) return taken.lock
  throw new Error(`held by ${taken.owner}`)
}

test('a second taker is told who has it, and gets it after a release', () => {
  const lock = take('pid 1')
  expect(takeProcessLock(path, 'pid 2')).toEqual({ owner: 'pid 1' })
  lock.release()
  lock.release()
  const next = take('pid 2')
  expect(takeProcessLock(path, 'pid 3')).toEqual({ owner: 'pid 2' })
  next.release()
})

test('the lock of another process is seen, and is gone when that process is killed', async () => {
  const module = JSON.stringify(join(import.meta.dirname, 'process-lock.ts'))
  const script = `
    const { takeProcessLock } = await import(${module})
    const taken = takeProcessLock(${JSON.stringify(path)}, 'pid ' + process.pid)
    const said = 'lock' in taken ? 'held' : taken.owner
    // Nobody refers to the lock any more, which is no reason to let go.
    setImmediate(() => {
      gc()
      setImmediate(() => console.log(said))
    })
    setInterval(() => {}, 1000)`
  const child = spawn(process.execPath, ['--expose-gc', '--input-type=module', '-e', script], {
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  try {
    const [line] = (await once(createInterface({ input: child.stdout }), 'line')) as [string]
    expect(line).toBe('held')
    expect(takeProcessLock(path, 'pid 2')).toEqual({ owner: `pid ${child.pid}` })
  } finally {
    child.kill('SIGKILL')
    await once(child, 'exit')
  }
  take('pid 3').release()
})
