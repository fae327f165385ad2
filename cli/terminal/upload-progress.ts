// How far a stream to the daemon is: counted here, since only the sender sees all of it.
import { Transform } from 'node:stream'
import type { TransformCallback } from 'node:stream'
import type { ProgressLine } from './progress.ts'

/** A terminal is written to at most this often. */
const updateMs = 200

/** Passes bytes on and shows how many passed. `totalBytes` null: not known. */
export function countingStream(line: ProgressLine, totalBytes: number | null): Transform {
  const startedAtMs = performance.now()
  let progressBytes = 0
  let shownAtMs = 0
  const show = (): void => {
    const nowMs = performance.now()
    if (nowMs - shownAtMs < updateMs) return
    shownAtMs = nowMs
    const rateBytesPerSecond = nowMs > startedAtMs ? (progressBytes / (nowMs - startedAtMs)) * 1000 : 0
    const leftBytes = totalBytes === null ? null : totalBytes - progressBytes
    const secondsLeft = leftBytes === null || rateBytesPerSecond === 0 ? null : leftBytes / rateBytesPerSecond
    line.update({ progressBytes, totalBytes, rateBytesPerSecond, secondsLeft })
  }
  return new Transform({
    transform(chunk: Buffer, _encoding: BufferEncoding, done: TransformCallback) {
      progressBytes += chunk.length
      show()
      done(null, chunk)
    },
  })
}
