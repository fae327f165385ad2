import { expect, test } from 'vitest'
import { readSparse, sparseHeader } from './sparse-frames.ts'

async function* inPieces(bytes: Buffer, pieceBytes: number): AsyncGenerator<Buffer> {
  for (let at = 0; at < bytes.length; at += pieceBytes) yield bytes.subarray(at, at + pieceBytes)
}

async function read(frames: Buffer, pieceBytes: number, lengthBytes: number): Promise<Buffer> {
  const content = Buffer.alloc(lengthBytes)
  await readSparse(inPieces(frames, pieceBytes), lengthBytes, async (data, offsetBytes) => void data.copy(content, offsetBytes))
  return content
}

const frames = Buffer.concat([sparseHeader(1, 3), Buffer.from('abc'), sparseHeader(4, 1), Buffer.from('d'), sparseHeader(10, 0)])

test('data is put where it belongs, however it arrives, and what is not sent is zeros', async () => {
  for (let pieceBytes = 1; pieceBytes <= frames.length; pieceBytes += 1) {
    expect(await read(frames, pieceBytes, 10), `pieces of ${pieceBytes}`).toEqual(Buffer.from('\0abcd\0\0\0\0\0'))
  }
  expect(await read(sparseHeader(0, 0), 5, 0)).toEqual(Buffer.alloc(0))
  const far = 2 ** 48
  await readSparse(
    inPieces(Buffer.concat([sparseHeader(far, 1), Buffer.from('x'), sparseHeader(far + 1, 0)]), 100),
    far + 1,
    async (_, at) => expect(at).toBe(far),
  )
})

test('what is cut off, out of order or too long is refused', async () => {
  for (let length = 0; length < frames.length; length += 1) {
    await expect(read(frames.subarray(0, length), 7, 10), `the first ${length} bytes`).rejects.toThrow(/it ended after/)
  }
  await expect(read(frames, 7, 9)).rejects.toThrow('do not belong')
  await expect(read(frames, 7, 11)).rejects.toThrow('do not belong')
  await expect(read(frames, 7, 4)).rejects.toThrow('do not belong')
  await expect(read(Buffer.concat([frames, Buffer.from('x')]), 7, 10)).rejects.toThrow('behind the end')
  const back = Buffer.concat([sparseHeader(4, 1), Buffer.from('d'), sparseHeader(4, 1), Buffer.from('e'), sparseHeader(10, 0)])
  await expect(read(back, 7, 10)).rejects.toThrow('do not belong')
})
