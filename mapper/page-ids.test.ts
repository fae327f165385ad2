import { describe, expect, it } from 'vitest'
import { PageIds } from './page-ids.ts'

describe('page ids', () => {
  it('gives overlapping checkpoints different numbers', () => {
    const ids = new PageIds(10)
    const first = ids.reserve(100)
    const second = ids.reserve(100)
    expect(second.firstPageId).toBe(first.endPageId)
  })

  it('takes numbers that no page got back, if nobody reserved later', () => {
    const ids = new PageIds(10)
    ids.trim(ids.reserve(100), 3)
    expect(ids.next).toBe(13)
  })

  it('never takes numbers back that lie below a later reservation', () => {
    const ids = new PageIds(10)
    const first = ids.reserve(100)
    const second = ids.reserve(100)
    ids.trim(first, 3)
    expect(ids.next).toBe(second.endPageId)
  })

  it('keeps the boundary below every checkpoint in flight', () => {
    const ids = new PageIds(10)
    const first = ids.reserve(100)
    const second = ids.reserve(100)
    ids.trim(second, 1)
    expect(ids.boundary()).toBe(10)
    ids.release(first)
    expect(ids.boundary()).toBe(second.firstPageId)
    ids.release(second)
    expect(ids.boundary()).toBe(second.firstPageId + 1)
  })
})
