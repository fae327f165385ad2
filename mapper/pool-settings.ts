/**
 * What the operator decides about a pool after it was made, as text that `pool set` takes and `pool show` gives back.
 *
 * | setting | value | default |
 * |---|---|---|
 * | `overcommit` | bytes of all volumes together, in sizes of the backend: a ratio such as `1`, `2.5`, `20`, or `unlimited` | `unlimited` |
 * | `low-space` | the alarm is on when less is free: `10%` of the backend, a size such as `50G`, or `off` | `10%` |
 * | `reserve` | kept back for deletes on a full backend: a size | what the driver's options say |
 * | `draining` | `yes`: nothing new is made in the pool; what is there works on | `no` |
 *
 * Over-commit is without limit unless it is set: volumes are thin, and what fills a pool is what is written. The alarm is
 * what warns in time, so that is on.
 */
import { AtollError, formatSize, isAtollError, parseSize, type CatalogTransaction, type PoolRow } from '@atoll/core'
import { reserveBytesMax, type Finding, type PoolUsage } from '@atoll/southbound'

/** When the alarm is on: less than this is free. */
export type LowSpaceThreshold = { readonly percent: number } | { readonly bytes: number } | 'off'

export interface PoolSettings {
  /** All volumes together may have this many times the bytes of the backend; null: as many as they like. */
  readonly overcommit: number | null
  readonly lowSpace: LowSpaceThreshold
  /** null: what the driver's options say. */
  readonly reserveBytes: number | null
  /** Nothing new is made in it. */
  readonly isDraining: boolean
}

export const poolSettingNames = ['overcommit', 'low-space', 'reserve', 'draining'] as const
export type PoolSettingName = (typeof poolSettingNames)[number]

/** The value that takes a setting back. */
export const defaultSetting = 'default'

const defaults = { overcommit: 'unlimited', 'low-space': '10%' } as const

const overcommitMax = 10_000

function invalid(name: string, value: string, why: string): AtollError {
  return new AtollError('POOL_OPTION_INVALID', `the setting ${name}=${JSON.stringify(value)} is wrong: ${why}`, {
    values: { setting: name, value },
  })
}

function requireName(name: string, value: string): void {
  if ((poolSettingNames as readonly string[]).includes(name)) return
  throw invalid(name, value, `there is no such setting (there are: ${poolSettingNames.join(', ')})`)
}

function parseOvercommit(text: string): number | null {
  if (text === 'unlimited') return null
  const ratio = /^\d{1,5}(?:\.\d{1,3})?$/.test(text) ? Number(text) : 0
  if (ratio > 0 && ratio <= overcommitMax) return ratio
  throw invalid('overcommit', text, `a ratio above 0 and up to ${overcommitMax} with at most 3 decimals is wanted, or unlimited`)
}

function parseSizeOf(name: PoolSettingName, text: string): number {
  try {
    return parseSize(text)
  } catch (error) {
    if (!isAtollError(error, 'SIZE_INVALID')) throw error
    throw invalid(name, text, error.message)
  }
}

function parseLowSpace(text: string): LowSpaceThreshold {
  if (text === 'off') return 'off'
  const percentText = /^(\d{1,2}(?:\.\d{1,2})?)%$/.exec(text)?.[1]
  if (percentText !== undefined && Number(percentText) > 0) return { percent: Number(percentText) }
  if (text.endsWith('%')) throw invalid('low-space', text, 'more than 0% and less than 100% is wanted')
  const bytes = parseSizeOf('low-space', text)
  if (bytes > 0) return { bytes }
  throw invalid('low-space', text, 'a part of the backend such as 10%, a size such as 50G, or off is wanted')
}

function parseReserve(text: string): number {
  const bytes = parseSizeOf('reserve', text)
  if (bytes <= reserveBytesMax) return bytes
  throw invalid('reserve', text, `at most ${formatSize(reserveBytesMax)} can be kept back`)
}

function parseDraining(text: string): boolean {
  if (text === 'yes' || text === 'no') return text === 'yes'
  throw invalid('draining', text, 'yes or no is wanted')
}

/** @throws AtollError POOL_DRAINING if nothing new may be made in the pool */
export async function requireNotDraining(tx: CatalogTransaction, poolId: string): Promise<void> {
  const row = await tx.selectFrom('pools').select(['name', 'settings']).where('id', '=', poolId).executeTakeFirst()
  // A pool that is gone is refused by whoever wants something of it.
  if (row === undefined || !parsePoolSettings(row.settings).isDraining) return
  throw new AtollError(
    'POOL_DRAINING',
    `pool "${row.name}" is being emptied, so nothing new is made in it: use another one, or take it back with 'atoll pool set ${row.name} draining=no'`,
    { values: { poolId, pool: row.name } },
  )
}

/**
 * What the settings of a row mean.
 * @throws AtollError POOL_OPTION_INVALID naming the setting, its value and what is allowed
 */
export function parsePoolSettings(settings: Readonly<Record<string, string>>): PoolSettings {
  for (const name of Object.keys(settings)) requireName(name, settings[name] ?? '')
  return {
    overcommit: parseOvercommit(settings['overcommit'] ?? defaults.overcommit),
    lowSpace: parseLowSpace(settings['low-space'] ?? defaults['low-space']),
    reserveBytes: settings['reserve'] === undefined ? null : parseReserve(settings['reserve']),
    isDraining: parseDraining(settings['draining'] ?? 'no'),
  }
}

/**
 * `settings` with `changes`; the value `default` takes one back.
 * @throws AtollError POOL_OPTION_INVALID
 */
export function changeSettings(
  settings: Readonly<Record<string, string>>,
  changes: Readonly<Record<string, string>>,
): Record<string, string> {
  for (const name of Object.keys(changes)) requireName(name, changes[name] ?? '')
  const kept = Object.entries({ ...settings, ...changes }).filter(([, value]) => value !== defaultSetting)
  const changed = Object.fromEntries(kept)
  parsePoolSettings(changed)
  return changed
}

/** The settings of a row with the defaults filled in; what the driver's options decide, and what a pool rarely is, is left out. */
export function shownSettings(settings: Readonly<Record<string, string>>): Record<string, string> {
  return { ...defaults, ...settings }
}

/** Free bytes below which the alarm of a backend of this size is on; 0: never. */
export function lowSpaceBytes(threshold: LowSpaceThreshold, totalBytes: number): number {
  if (threshold === 'off') return 0
  return 'bytes' in threshold ? threshold.bytes : Math.floor((totalBytes * threshold.percent) / 100)
}

/** What a check says about the space of a pool: whether its alarm would be on. */
export function lowSpaceFindings(
  pool: Pick<PoolRow, 'id' | 'name' | 'settings'>,
  { freeBytes, totalBytes }: Pick<PoolUsage, 'freeBytes' | 'totalBytes'>,
): Finding[] {
  const limitBytes = lowSpaceBytes(parsePoolSettings(pool.settings).lowSpace, totalBytes)
  if (freeBytes >= limitBytes) return []
  const message =
    `pool "${pool.name}" has ${formatSize(freeBytes)} of ${formatSize(totalBytes)} free, less than the ${formatSize(limitBytes)} of its ` +
    'low-space setting: delete something and reclaim, or make the backend larger'
  return [{ severity: 'warning', kind: 'low-space', object: pool.id, message }]
}
