/** Starts the thread of catalog-task-worker.ts for one task. */
import { Worker } from 'node:worker_threads'

type Answer<T> = { result: T } | { failure: { name: string; message: string; code?: unknown } }

/** Resolves with what the thread answers. @throws what it threw, with its name and code */
export async function runCatalogTask<T>(data: object): Promise<T> {
  const worker = new Worker(new URL('./catalog-task-worker.ts', import.meta.url), { workerData: data })
  const answer = await new Promise<Answer<T>>((resolve, reject) => {
    worker.once('message', resolve)
    worker.once('error', reject)
    worker.once('exit', () => reject(new Error('the thread that reads the catalog ended without an answer')))
  })
  if ('result' in answer) return answer.result
  const { name, message, code } = answer.failure
  throw Object.assign(new Error(message), { name, code })
}
