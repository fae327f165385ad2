/**
 * Root words as the catalog stores them (see the format in native/map): 0 is a map of holes, `1 << 60 | alias` a map of which
 * every slot belongs to one layer, `2 << 60 | page id` a tree.
 */
import { AtollError } from '@atoll/core'
import type { RootRef } from '@atoll/native'

const tagShift = 60n
const payloadMask = (1n << tagShift) - 1n
const uniformTag = 1n
const pageTag = 2n

/** The owner of a slot that nobody wrote. */
export const holeOwner = 0

/** The root of a map of holes. */
export const holeRoot: RootRef = { word: 0n, crc: 0 }

/** The root of a map in which every slot belongs to `alias`. */
export function uniformRoot(alias: number): RootRef {
  return { word: (uniformTag << tagShift) | BigInt(alias), crc: 0 }
}

/** The page of a root that has one. */
export function pageOfRoot(root: RootRef): number | undefined {
  return root.word >> tagShift === pageTag ? Number(root.word & payloadMask) : undefined
}

/** The layer of a root that gives every slot to one. */
export function uniformOwner(root: RootRef): number | undefined {
  return root.word >> tagShift === uniformTag ? Number(root.word & payloadMask) : undefined
}

/** The root of a row. */
export function rootOf(row: { root_word: bigint; root_crc: number }): RootRef {
  return { word: row.root_word, crc: row.root_crc }
}

export function sameRoot(a: RootRef, b: RootRef): boolean {
  return a.word === b.word && a.crc === b.crc
}

/**
 * Whether a map with this root may refer to `alias`, without looking into its pages: false is certain, true is not.
 * @throws AtollError PAGE_CORRUPT for a word of no known form
 */
export function rootMayReferTo(root: RootRef, alias: number): boolean {
  if (root.word === 0n) return false
  const tag = root.word >> tagShift
  if (tag === uniformTag) return (root.word & payloadMask) === BigInt(alias)
  if (tag === pageTag) return true
  throw new AtollError('PAGE_CORRUPT', `root word ${root.word} is of no known form`, {
    values: { rootWord: root.word.toString() },
  })
}
