// How content travels from the daemon to a command that writes a file: stretches of data, each with where it belongs, and nothing
// for what is zeros in between.
//
// | offset | size | field |
// |---|---|---|
// | 0 | 8 | where the data belongs, in bytes from the start of what was asked for; big-endian, never less than the end of the last |
// | 8 | 4 | bytes of data that follow; big-endian; 0: this is the end, and the offset is the length of everything |

export const sparseContentType = 'application/vnd.atoll.sparse'

const headerBytes = 12

/** @param lengthBytes below 2^32 */
export function sparseHeader(offsetBytes: number, lengthBytes: number): Buffer {
  const header = Buffer.alloc(headerBytes)
  header.writeBigUInt64BE(BigInt(offsetBytes), 0)
  header.writeUInt32BE(lengthBytes, 8)
  return header
}

/**
 * Takes frames apart; `write` gets the data in the pieces in which it arrives.
 * @throws Error when they do not belong to `lengthBytes` bytes, or end before their end
 */
export async function readSparse(
  body: AsyncIterable<Buffer>,
  lengthBytes: number,
  write: (data: Buffer, offsetBytes: number) => Promise<void>,
): Promise<void> {
  let header = Buffer.alloc(0)
  let atBytes = 0
  let leftBytes = 0
  let ended = false
  for await (let chunk of body) {
    while (chunk.length > 0) {
      if (ended) throw new Error('there is something behind the end')
      if (leftBytes > 0) {
        const data = chunk.subarray(0, leftBytes)
        chunk = chunk.subarray(data.length)
        await write(data, atBytes)
        atBytes += data.length
        leftBytes -= data.length
        continue
      }
      const wantedBytes = headerBytes - header.length
      header = Buffer.concat([header, chunk.subarray(0, wantedBytes)])
      chunk = chunk.subarray(wantedBytes)
      if (header.length < headerBytes) continue
      const offsetBytes = Number(header.readBigUInt64BE(0))
      leftBytes = header.readUInt32BE(8)
      header = Buffer.alloc(0)
      ended = leftBytes === 0
      if (offsetBytes < atBytes || offsetBytes + leftBytes > lengthBytes || (ended && offsetBytes !== lengthBytes)) {
        throw new Error(`${leftBytes} bytes at ${offsetBytes} do not belong to ${lengthBytes} bytes`)
      }
      atBytes = offsetBytes
    }
  }
  if (!ended) throw new Error(`it ended after ${atBytes} of ${lengthBytes} bytes`)
}
