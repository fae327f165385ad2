/**
 * The thread that folds the write-ahead log into the catalog's file, so that neither a commit nor the event loop waits for
 * those writes and syncs. It has a connection of its own; PASSIVE never blocks a writer.
 */
import { parentPort, workerData } from 'node:worker_threads'
import Database from 'better-sqlite3'

const port = parentPort
if (port === null) throw new Error('this file runs as a worker thread only')

const { path } = workerData as { path: string }
const database = new Database(path, { fileMustExist: true, timeout: 1000 })
// The log must be on the disk before the file is touched, and the file before the log is used again.
database.pragma('synchronous = FULL')
database.pragma('wal_autocheckpoint = 0')
const checkpoint = database.prepare('pragma wal_checkpoint(PASSIVE)')

port.on('message', (message: 'checkpoint' | 'close') => {
  if (message === 'close') {
    database.close()
    port.close()
    return
  }
  try {
    const { log, checkpointed } = checkpoint.get() as { log: number; checkpointed: number }
    port.postMessage({ logFrames: log, foldedFrames: checkpointed })
  } catch (error) {
    port.postMessage({ error: error instanceof Error ? error.message : String(error) })
  }
})
