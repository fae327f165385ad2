/** Blocks of this size that hold nothing but zeros are not written to a fresh target. */
export const zeroBlockBytes = 4096
const zeroBlock = Buffer.alloc(zeroBlockBytes)

/** The stretches of `data` that are not zero, in whole blocks counted from its start; neighbours are one stretch. */
export function nonZeroRuns(data: Uint8Array): { startBytes: number; endBytes: number }[] {
  const runs: { startBytes: number; endBytes: number }[] = []
  for (let startBytes = 0; startBytes < data.length; startBytes += zeroBlockBytes) {
    const endBytes = Math.min(startBytes + zeroBlockBytes, data.length)
    if (zeroBlock.compare(data, startBytes, endBytes, 0, endBytes - startBytes) === 0) continue
    const last = runs.at(-1)
    if (last?.endBytes === startBytes) last.endBytes = endBytes
    else runs.push({ startBytes, endBytes })
  }
  return runs
}
