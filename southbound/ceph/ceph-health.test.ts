import type { StoreHealth } from '@atoll/native'
import { expect, test } from 'vitest'
import { conditionsOf } from './ceph-health.ts'

const well: StoreHealth = { observedAgoMs: 5, answerMs: 1, isCounted: true }

/** Health as `ceph health detail -f json` has it; a check is its severity, its summary and its details. */
function reporting(checks: Record<string, readonly [severity: string, summary: string, ...details: string[]]>): StoreHealth {
  const entries = Object.entries(checks).map(([name, [severity, summary, ...details]]) => [
    name,
    {
      severity,
      summary: { message: summary, count: 1 },
      detail: details.map((message) => ({ message })),
      muted: name.startsWith('MUTED_'),
    },
  ])
  return { ...well, report: JSON.stringify({ status: 'HEALTH_WARN', checks: Object.fromEntries(entries) as unknown, mutes: [] }) }
}

const kindsOf = (health: StoreHealth): string[] =>
  conditionsOf('atoll', health).map(({ kind, severity }) => `${severity} ${kind}`)

test('a pool that answers, in a cluster of which nothing is said, has no conditions', () => {
  expect(conditionsOf('atoll', well)).toEqual([])
  expect(conditionsOf('atoll', { ...well, report: '' })).toEqual([])
  expect(conditionsOf('atoll', reporting({}))).toEqual([])
  expect(conditionsOf('atoll', { ...well, report: 'what no version says' })).toEqual([])
})

test('what keeps clients waiting is an error, and what may is a warning', () => {
  expect(kindsOf(reporting({ OSD_DOWN: ['HEALTH_WARN', '1 osds down'] }))).toEqual(['warning osds-down'])
  expect(kindsOf(reporting({ OSD_HOST_DOWN: ['HEALTH_WARN', '1 host (1 osds) down'] }))).toEqual(['warning osds-down'])
  expect(kindsOf(reporting({ SLOW_OPS: ['HEALTH_WARN', '3 slow ops, oldest one blocked for 40 sec'] }))).toEqual([
    'warning slow-requests',
  ])
  expect(kindsOf(reporting({ PG_AVAILABILITY: ['HEALTH_WARN', 'Reduced data availability: 8 pgs inactive'] }))).toEqual([
    'error inactive',
  ])
  expect(kindsOf(reporting({ MON_DOWN: ['HEALTH_WARN', '1/3 mons down, quorum a,b'] }))).toEqual(['warning monitors-down'])
  expect(kindsOf(reporting({ OSDMAP_FLAGS: ['HEALTH_WARN', 'pauserd,pausewr flag(s) set'] }))).toEqual(['error paused'])
  expect(kindsOf(reporting({ OSDMAP_FLAGS: ['HEALTH_WARN', 'noout,nobackfill flag(s) set'] }))).toEqual([])
})

test('a pool is full if it is named among those that are', () => {
  const full = (pool: string): StoreHealth =>
    reporting({
      OSD_FULL: ['HEALTH_ERR', '1 full osd(s)', 'osd.0 is full'],
      POOL_FULL: ['HEALTH_WARN', '1 pool(s) full', `pool '${pool}' is full (no space)`],
    })
  expect(kindsOf(full('atoll'))).toEqual(['warning osds-full', 'error full'])
  expect(kindsOf(full('atoll-2'))).toEqual(['warning osds-full'])
  expect(kindsOf(reporting({ POOL_NEARFULL: ['HEALTH_WARN', '1 pool(s) nearfull', "pool 'atoll' is nearfull"] }))).toEqual([
    'warning nearly-full',
  ])
})

test('of other checks only errors are told, and nothing that was muted', () => {
  expect(kindsOf(reporting({ POOL_NO_REDUNDANCY: ['HEALTH_WARN', '1 pool(s) have no replicas configured'] }))).toEqual([])
  expect(conditionsOf('atoll', reporting({ FS_DEGRADED: ['HEALTH_ERR', '1 filesystem is degraded'] }))).toEqual([
    { kind: 'cluster-error', severity: 'warning', message: 'the cluster says FS_DEGRADED: 1 filesystem is degraded' },
  ])
  expect(kindsOf(reporting({ MUTED_OSD_DOWN: ['HEALTH_ERR', '1 osds down'] }))).toEqual([])
})

test('a pool or monitors that do not answer are told, with for how long', () => {
  const failure = { code: 'POOL_UNAVAILABLE', message: 'a read was not answered within 5 s' }
  const silent = conditionsOf('atoll', { ...well, failure, silentMs: 12_345 })
  expect(silent).toEqual([{ kind: 'silent', severity: 'error', message: expect.stringMatching(/12 s.*within 5 s/) as string }])
  expect(kindsOf({ ...well, reportFailure: failure })).toEqual(['warning monitors-silent'])
  const fenced = { code: 'POOL_UNAVAILABLE', message: 'the cluster shut this client out (it is on the blocklist): …' }
  expect(kindsOf({ ...well, failure: fenced })).toEqual(['error shut-out'])
  expect(kindsOf({ ...well, failure: { code: 'IO_ERROR', message: 'Input/output error' } })).toEqual(['error failing'])
  expect(kindsOf({ ...well, isCounted: false })).toEqual(['note counting'])
})
