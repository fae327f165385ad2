import { describe, expect, it } from 'vitest'
import { UnflushedChanges } from './unflushed-changes.ts'

const write = (offsetBytes: number, lengthBytes = 4) => ({
  kind: 'write' as const,
  offsetBytes,
  lengthBytes,
  data: new Uint8Array(lengthBytes).fill(offsetBytes),
})

describe('the record of unflushed changes', () => {
  it('forgets what was answered before a flush was sent and keeps what came between', () => {
    const changes = new UnflushedChanges(10_000)
    changes.add(write(1))
    const mark = changes.mark()
    changes.add(write(2))
    changes.flushed(mark)
    expect(changes.changes().map((change) => change.offsetBytes)).toEqual([2])
  })
  it('takes marks in any order of their answers', () => {
    const changes = new UnflushedChanges(10_000)
    changes.add(write(1))
    const first = changes.mark()
    changes.add(write(2))
    const second = changes.mark()
    changes.add(write(3))
    changes.flushed(second)
    changes.flushed(first)
    expect(changes.changes().map((change) => change.offsetBytes)).toEqual([3])
  })
  it('keeps copies', () => {
    const changes = new UnflushedChanges(10_000)
    const change = write(7)
    changes.add(change)
    change.data.fill(0)
    expect(changes.changes()[0]!.data).toEqual(new Uint8Array(4).fill(7))
  })
  it('is full at its bound and empty again after a flush', () => {
    const changes = new UnflushedChanges(300)
    expect(changes.hasRoomFor(write(1, 1000))).toBe(true)
    changes.add(write(1, 100))
    expect(changes.hasRoomFor(write(1, 100))).toBe(false)
    changes.flushed(changes.mark())
    expect(changes.hasRoomFor(write(1, 100))).toBe(true)
  })
})
