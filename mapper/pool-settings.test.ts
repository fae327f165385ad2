import { describe, expect, it } from 'vitest'
import { changeSettings, lowSpaceBytes, lowSpaceFindings, parsePoolSettings, shownSettings } from './pool-settings.ts'

const gibibyte = 2 ** 30

describe('the settings of a pool', () => {
  it('are without limit, with an alarm at a tenth, until they are set', () => {
    expect(parsePoolSettings({})).toEqual({ isDraining: false, overcommit: null, lowSpace: { percent: 10 }, reserveBytes: null })
    expect(shownSettings({ reserve: '1G' })).toEqual({ overcommit: 'unlimited', 'low-space': '10%', reserve: '1G' })
  })

  it('are read as they are typed', () => {
    expect(parsePoolSettings({ overcommit: '2.5', 'low-space': '50G', reserve: '128M' })).toEqual({
      isDraining: false,
      overcommit: 2.5,
      lowSpace: { bytes: 50 * gibibyte },
      reserveBytes: 128 * 2 ** 20,
    })
    expect(parsePoolSettings({ overcommit: 'unlimited', 'low-space': 'off' })).toMatchObject({
      overcommit: null,
      lowSpace: 'off',
    })
  })

  it.each([
    ['overcommit', '0'],
    ['overcommit', '-1'],
    ['overcommit', '1e3'],
    ['overcommit', '20000'],
    ['overcommit', '1.0001'],
    ['overcommit', ''],
    ['low-space', '0%'],
    ['low-space', '100%'],
    ['low-space', '0'],
    ['low-space', 'some'],
    ['reserve', '65G'],
    ['reserve', 'much'],
    ['colour', 'red'],
    ['colour', 'default'],
  ])('are refused with their name and value: %s=%s', (setting, value) => {
    const refused = expect.objectContaining({ code: 'POOL_OPTION_INVALID', values: { setting, value } }) as Error
    expect(() => changeSettings({}, { [setting]: value })).toThrow(refused)
  })

  it('change one by one, and "default" takes one back', () => {
    const changed = changeSettings({ overcommit: '4', reserve: '1G' }, { overcommit: 'default', 'low-space': '5%' })
    expect(changed).toEqual({ reserve: '1G', 'low-space': '5%' })
  })
})

it('the alarm is a part of the backend, a number of bytes, or off', () => {
  expect(lowSpaceBytes({ percent: 10 }, 50 * gibibyte)).toBe(5 * gibibyte)
  expect(lowSpaceBytes({ bytes: gibibyte }, 50 * gibibyte)).toBe(gibibyte)
  expect(lowSpaceBytes('off', 50 * gibibyte)).toBe(0)
})

it('a check finds that space is low where the alarm would be on', () => {
  const kinds = (freeBytes: number, settings: Record<string, string> = {}): string[] =>
    lowSpaceFindings({ id: '1', name: 'p', settings }, { freeBytes, totalBytes: 1000 }).map(({ kind }) => kind)
  expect(kinds(100)).toEqual([])
  expect(kinds(99)).toEqual(['low-space'])
  expect(kinds(99, { 'low-space': '5%' })).toEqual([])
  expect(kinds(600, { 'low-space': '601' })).toEqual(['low-space'])
  expect(kinds(0, { 'low-space': 'off' })).toEqual([])
})

it('a pool that is drained says so', () => {
  expect(parsePoolSettings({ draining: 'yes' }).isDraining).toBe(true)
  expect(changeSettings({ draining: 'yes' }, { draining: 'default' })).toEqual({})
  expect(() => parsePoolSettings({ draining: 'maybe' })).toThrow(/yes or no/)
})
