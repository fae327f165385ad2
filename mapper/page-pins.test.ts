import { describe, expect, it } from 'vitest'
import { PagePins } from './page-pins.ts'

describe('page pins', () => {
  it('keep replaced pages until the last pin is gone', () => {
    const freed: number[][] = []
    const pins = new PagePins((pageIds) => freed.push(pageIds))
    const first = pins.pin()
    const second = pins.pin()
    pins.defer([1, 2])
    pins.defer([3])
    first.release()
    expect(freed).toEqual([])
    second.release()
    expect(freed).toEqual([[1, 2, 3]])
  })

  it('let a sweep wait for older pins and for no later one', async () => {
    const pins = new PagePins(() => undefined)
    const older = pins.pin()
    const own = pins.pin()
    const later = pins.pin()
    let waited = false
    const waiting = pins.olderReleased(own).then(() => {
      waited = true
    })
    await Promise.resolve()
    expect(waited).toBe(false)
    older.release()
    await waiting
    expect(waited).toBe(true)
    later.release()
    own.release()
  })

  it('may be released twice', () => {
    const freed: number[][] = []
    const pins = new PagePins((pageIds) => freed.push(pageIds))
    const pin = pins.pin()
    pins.defer([1])
    pin.release()
    pin.release()
    expect(freed).toEqual([[1]])
  })
})
