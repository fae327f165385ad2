// How far a stream to or from the daemon is: counted here, where all of it passes.
import { Transform } from 'node:stream'
import type { TransformCallback } from 'node:stream'
import type { ProgressLine } from './progress.ts'

/** A terminal is written to at most this often. */
const updateMs = 200

/** Shows how far something is each time it is called; `totalBytes` null: not known. */
export function progressOn(line: ProgressLine, totalBytes: number | null): (progressBytes: number) => void {
  const startedAtMs = performance.now()
  let shownAtMs = 0
  return (progressBytes) => {
    const nowMs = performance.now()
    if (nowMs - shownAtMs < updateMs) return
    shownAtMs = nowMs
    const rateBytesPerSecond = nowMs > startedAtMs ? (progressBytes / (nowMs - startedAtMs)) * 1000 : 0
    const leftBytes = totalBytes === null ? null : totalBytes - progressBytes
    const secondsLeft = leftBytes === null || rateBytesPerSecond === 0 ? null : leftBytes / rateBytesPerSecond
    line.update({ progressBytes, totalBytes, rateBytesPerSecond, secondsLeft })
  }
}

/** Passes bytes on and shows how many passed. `totalBytes` null: not known. */
export function countingStream(line: ProgressLine, totalBytes: number | null): Transform {
  const show = progressOn(line, totalBytes)
  let progressBytes = 0
  return new Transform({
    transform(chunk: Buffer, _encoding: BufferEncoding, done: TransformCallback) {
      progressBytes += chunk.length
      show(progressBytes)
      done(null, chunk)
    },
  })
}
