/** libnbd's Python module against the real daemon: thousands of random requests, each answer checked against a model. */
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { describeWithTools, pythonLibnbdTool } from '@atoll/nbd-client/testing'
import { ClientStand, fileDifference } from './client-stand.ts'
import { runClient } from './run-client.ts'

const seed = Number(process.env['ATOLL_SEED'] ?? '20261121')

describeWithTools('libnbd for Python', [pythonLibnbdTool], () => {
  let stand: ClientStand
  beforeAll(async () => {
    stand = await ClientStand.create()
  })
  afterAll(async () => {
    await stand?.[Symbol.asyncDispose]()
  })

  const python = (uri: string, before: string, seed: number, after: string): Promise<string> =>
    runClient('/usr/bin/python3', join(import.meta.dirname, 'random_requests.py'), uri, before, String(seed), after)

  /** Everything in an export, read in one piece after the other on one connection. */
  async function read(uri: string): Promise<string> {
    const path = stand.file('read.raw')
    const script = `
import nbd, sys
h = nbd.NBD()
h.connect_uri(sys.argv[1])
with open(sys.argv[2], 'wb') as file:
    for at in range(0, h.get_size(), 1 << 20):
        file.write(h.pread(1 << 20, at))
h.shutdown()
`
    await runClient('/usr/bin/python3', '-c', script, uri, path)
    return path
  }

  test('gets the right answer to each of thousands of requests on four connections, while snapshots are taken', async () => {
    console.log(`ATOLL_SEED=${seed}`)
    const uri = stand.clone('random')
    let running = true
    const [first, second] = [stand.file('first.raw'), stand.file('second.raw')]
    const requests = python(uri, stand.contentPath, seed, first).finally(() => (running = false))
    let taken = 0
    while (running && taken < 20) {
      await stand.home.snapshotMeanwhile(`random@s${taken}`)
      taken += 1
    }
    console.log(await requests, `${taken} snapshots`)
    expect(await fileDifference(await read(uri), await readFile(first))).toBeNull()

    // What was flushed outlives the daemon, and so does what a snapshot holds.
    stand.home.cli('snapshot', 'create', 'random@first')
    await stand.crash()
    await python(uri, first, seed + 1, second)
    await stand.crash()
    expect(await fileDifference(await read(uri), await readFile(second))).toBeNull()
    stand.home.cli('volume', 'create', 'random-past', '--from', 'snapshot:random@first')
    expect(await fileDifference(await read(stand.attach('random-past', '--read-only')), await readFile(first))).toBeNull()
  })
})
