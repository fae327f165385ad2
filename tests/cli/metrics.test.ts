import { spawnSync } from 'node:child_process'
import { request } from 'node:http'
import { join } from 'node:path'
import { text as readText } from 'node:stream/consumers'
import { connect } from '@atoll/nbd-client'
import { describe, expect, test } from 'vitest'
import { TestHome } from '../test-home.ts'
import { hasPrograms } from './test-programs.ts'

async function overAdminSocket(home: TestHome, path: string): Promise<{ type: string | undefined; body: string }> {
  const { promise, resolve, reject } = Promise.withResolvers<{ type: string | undefined; body: string }>()
  const asked = request({ socketPath: join(home.path, 'admin.sock'), path }, (response) => {
    readText(response).then((body) => resolve({ type: response.headers['content-type'], body }), reject)
  })
  asked.on('error', reject)
  asked.end()
  return await promise
}

/** What promtool has to say: nothing, of a text that is well made. */
function promtool(text: string): string {
  const { status, stdout, stderr } = spawnSync('promtool', ['check', 'metrics'], { input: text, encoding: 'utf8' })
  return status === 0 && stderr === '' ? stdout : `exit ${status}: ${stdout}${stderr}`
}

/** The value of the one line that starts like this. */
function value(text: string, start: string): number {
  const found = text.split('\n').filter((line) => line.startsWith(`${start} `))
  expect(found, start).toHaveLength(1)
  return Number(found[0]?.slice(start.length + 1))
}

describe('metrics', () => {
  test('tell everybody of pools and the daemon, and whoever may use the admin socket of each volume', async () => {
    await using home = await TestHome.create()
    const { http } = await home.start()
    home.cli('volume', 'create', 'my-secret-name', '--size', '64M')
    const client = await connect(home.cli('volume', 'attach', 'my-secret-name', '--format', 'uri'))
    await client.write(0, Buffer.alloc(65_536, 1))
    for (let reads = 0; reads < 3; reads += 1) await client.read(0, 4096)
    await client.flush()

    const answer = await fetch(`${http}/metrics`)
    expect(answer.status).toBe(200)
    expect(answer.headers.get('content-type')).toMatch(/^text\/plain; version=0\.0\.4/)
    const open = await answer.text()
    expect(value(open, 'atoll_volumes')).toBe(1)
    expect(value(open, 'atoll_attached')).toBe(1)
    expect(value(open, 'atoll_pool_up{pool="default"}')).toBe(1)
    expect(value(open, 'atoll_pool_total_bytes{pool="default"}')).toBeGreaterThan(0)
    expect(value(open, 'atoll_pool_provisioned_bytes{pool="default"}')).toBe(64 * 2 ** 20)
    expect(value(open, 'atoll_pool_request_seconds_count{pool="default",operation="read"}')).toBe(3)
    expect(value(open, 'atoll_pool_transferred_bytes_total{pool="default",operation="write"}')).toBe(65_536)
    expect(value(open, 'atoll_catalog_size_bytes{file="catalog"}')).toBeGreaterThan(0)
    expect(value(open, 'atoll_jobs{state="running"}')).toBe(0)
    // What no limit is set for is not there: 0 would mean that nothing is allowed.
    expect(open).not.toContain('atoll_pool_provisioned_limit_bytes{')
    for (const secret of ['my-secret-name', 'atoll_volume_', 'project']) expect(open).not.toContain(secret)

    const { type, body } = await overAdminSocket(home, '/v1/metrics')
    expect(type).toMatch(/^text\/plain; version=0\.0\.4/)
    const { id } = home.json<{ id: string }>('volume', 'show', 'my-secret-name')
    expect(value(body, `atoll_volume_request_seconds_count{volume="${id}",operation="read"}`)).toBe(3)
    expect(body).toMatch(
      new RegExp(`^atoll_volume_info\\{volume="${id}",name="my-secret-name",pool="default",project="[^"]+"\\} 1$`, 'm'),
    )
    await client.disconnect()

    // A label is whatever a pool is called.
    home.cli('pool', 'create', 'odd "name" \\ é', '--driver', 'memory')
    home.cli('pool', 'set', 'odd "name" \\ é', 'overcommit=2')
    const after = (await overAdminSocket(home, '/v1/metrics')).body
    expect(value(after, 'atoll_pool_provisioned_limit_bytes{pool="odd \\"name\\" \\\\ é"}')).toBe(2 * 2 ** 30)
  })

  test.skipIf(!hasPrograms('promtool'))('are what Prometheus takes, by promtool (package prometheus)', async () => {
    await using home = await TestHome.create()
    const { http } = await home.start()
    home.cli('volume', 'create', 'disk', '--size', '64M')
    home.cli('volume', 'attach', 'disk')
    home.cli('pool', 'set', 'default', 'overcommit=20')
    const open = await (await fetch(`${http}/metrics`)).text()
    const { body } = await overAdminSocket(home, '/v1/metrics')
    expect(promtool(open)).toBe('')
    expect(promtool(body)).toBe('')
    // It does look.
    expect(promtool(body.replace('# TYPE atoll_volumes gauge', '# TYPE atoll_volumes counter'))).toContain('atoll_volumes')
    expect(promtool(body.replace('le="+Inf"', 'le="+Inf'))).toContain('exit')
  })
})
