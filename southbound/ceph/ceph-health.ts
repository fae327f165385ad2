/**
 * What a look at a cluster means for a pool in it. Ceph's own health checks are many; those that concern who reads and writes are
 * taken, whatever it is called in its documentation ("Health checks"), and of the others only what is an error.
 */
import type { StoreHealth } from '@atoll/native'
import { z } from 'zod'
import type { PoolCondition, PoolConditionKind } from '../driver.ts'

const report = z.object({
  checks: z.record(
    z.string(),
    z.object({
      severity: z.string(),
      summary: z.object({ message: z.string() }),
      detail: z.array(z.object({ message: z.string() })).default([]),
      muted: z.boolean().default(false),
    }),
  ),
})

type Check = z.infer<typeof report>['checks'][string]

interface Meaning {
  readonly kind: PoolConditionKind
  readonly severity: PoolCondition['severity']
  /** What follows for volumes of the pool. */
  readonly effect: string
  /** It names pools, and counts for those only. */
  readonly namesPools?: boolean
}

const nearlyFull = { kind: 'nearly-full', severity: 'warning', effect: 'writes wait when it is full' } as const

const meanings: readonly (readonly [RegExp, Meaning])[] = [
  [/^MON_DOWN$/, { kind: 'monitors-down', severity: 'warning', effect: 'those that are left do their work' }],
  [/^OSD_([A-Z]+_)?DOWN$/, { kind: 'osds-down', severity: 'warning', effect: 'what only they have waits' }],
  [/^POOL_FULL$/, { kind: 'full', severity: 'error', effect: 'writes wait', namesPools: true }],
  [/^OSD_FULL$/, { kind: 'osds-full', severity: 'warning', effect: 'writes to pools that lie on them wait' }],
  [/^POOL_(NEAR_FULL|NEARFULL|BACKFILLFULL)$/, { ...nearlyFull, namesPools: true }],
  [/^OSD_(NEARFULL|BACKFILLFULL)$/, nearlyFull],
  [/^PG_AVAILABILITY$/, { kind: 'inactive', severity: 'error', effect: 'what lies in these groups waits' }],
  [/^PG_DEGRADED$/, { kind: 'degraded', severity: 'warning', effect: 'there are fewer copies than there should be' }],
  [/^(PG_DAMAGED|OSD_SCRUB_ERRORS)$/, { kind: 'damaged', severity: 'error', effect: 'copies differ: see `ceph health detail`' }],
  [/^SLOW_OPS$/, { kind: 'slow-requests', severity: 'warning', effect: 'clients wait' }],
  [/^OSDMAP_FLAGS$/, { kind: 'paused', severity: 'error', effect: 'reads or writes wait' }],
]

/** Flags of the whole cluster that keep clients waiting; others (noout, noscrub, …) do not. */
const pausing = /\b(pauserd|pausewr|full)\b/

/** What is to be said of the pool `pool` in the cluster. */
export function conditionsOf(pool: string, health: StoreHealth): PoolCondition[] {
  const conditions: PoolCondition[] = []
  const add = (kind: PoolConditionKind, severity: PoolCondition['severity'], message: string): void => {
    if (!conditions.some((known) => known.kind === kind && known.message === message))
      conditions.push({ kind, severity, message })
  }
  const { failure, silentMs, reportFailure } = health
  if (silentMs !== undefined) {
    const seconds = Math.floor(silentMs / 1000)
    add('silent', 'error', `pool ${pool} has not answered for ${seconds} s; clients wait: ${failure?.message ?? 'no answer'}`)
  } else if (failure !== undefined) add(/blocklist/.test(failure.message) ? 'shut-out' : 'failing', 'error', failure.message)
  if (reportFailure !== undefined) {
    add('monitors-silent', 'warning', `${reportFailure.message}; reads and writes go on as long as no OSD comes or goes`)
  } else {
    for (const [name, check] of Object.entries(checksIn(health.report))) {
      if (check.muted) continue
      const meaning = meanings.find(([pattern]) => pattern.test(name))?.[1]
      if (meaning !== undefined && concerns(meaning, pool, check))
        add(meaning.kind, meaning.severity, `${check.summary.message}; ${meaning.effect}`)
      else if (meaning === undefined && check.severity === 'HEALTH_ERR')
        add('cluster-error', 'warning', `the cluster says ${name}: ${check.summary.message}`)
    }
  }
  if (!health.isCounted) add('counting', 'note', 'what the pool holds is being counted: "stored" is less than that')
  return conditions
}

function checksIn(text: string | undefined): Record<string, Check> {
  if (text === undefined || text === '') return {}
  try {
    return report.parse(JSON.parse(text)).checks
  } catch {
    // Of a version that says it otherwise: what the pool answers is known all the same.
    return {}
  }
}

function concerns({ kind, namesPools }: Meaning, pool: string, { summary, detail }: Check): boolean {
  if (kind === 'paused') return pausing.test(summary.message)
  return namesPools !== true || detail.some(({ message }) => message.includes(`'${pool}'`))
}
