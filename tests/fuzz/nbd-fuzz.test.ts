/** A short run of the fuzzer, ATOLL_FUZZ_MS long (default 5 s); `npm run fuzz` is the long one. ATOLL_FUZZ_SEED replays. */
import { expect, test } from 'vitest'
import { fuzzNbd, grownBytesMax } from './nbd-fuzz.ts'

const durationMs = Number(process.env['ATOLL_FUZZ_MS'] ?? 5_000)
const seed = Number(process.env['ATOLL_FUZZ_SEED'] ?? 20_261_121)

test(
  `a daemon survives conversations that make no sense (ATOLL_FUZZ_SEED=${seed}), and keeps its memory`,
  async () => {
    const report = await fuzzNbd({ seed, durationMs })
    expect(report.tlsHandshakes).toBeGreaterThan(0)
    expect(report.rssMaxBytes - report.rssStartBytes).toBeLessThan(grownBytesMax)
  },
  durationMs + 600_000,
)
