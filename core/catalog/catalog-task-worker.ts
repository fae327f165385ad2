/**
 * The thread for work that reads the whole catalog, so that the event loop goes on meanwhile. It has a read-only connection
 * of its own and sees one state: what was committed when it began.
 */
import { parentPort, workerData } from 'node:worker_threads'
import Database from 'better-sqlite3'
import { verifyDatabase } from './verify-database.ts'

const port = parentPort
if (port === null) throw new Error('this file runs as a worker thread only')

try {
  const { path, imagePath } = workerData as { path: string; imagePath?: string }
  const database = new Database(path, { readonly: true, fileMustExist: true, timeout: 1000 })
  try {
    if (imagePath === undefined) {
      port.postMessage({ result: verifyDatabase(database) })
    } else {
      // One state of it, without what was deleted; a table that cannot be read fails it.
      database.prepare('vacuum into ?').run(imagePath)
      port.postMessage({ result: null })
    }
  } finally {
    database.close()
  }
} catch (error) {
  // Errors lose their class on the way to another thread.
  const { name, message, code } = error as Error & { code?: unknown }
  port.postMessage({ failure: { name, message, code } })
}
