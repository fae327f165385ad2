/** Work over very many rows, cut so that the event loop turns in between. */
import { setImmediate as nextTurn } from 'node:timers/promises'

/** Rows read in one turn: a few milliseconds. */
const rowsAtOnce = 1000
/** Items that something short is done with in one turn. */
const itemsAtOnce = 4000

/** All rows, in the order of their keys: `read` gives at most `limit` of those behind the key `after`. */
export async function inPieces<Row, Key>(
  read: (after: Key, limit: number) => Promise<Row[]>,
  keyOf: (row: Row) => Key,
  before: Key,
): Promise<Row[]> {
  const rows: Row[] = []
  for (let after = before; ;) {
    const piece = await read(after, rowsAtOnce)
    for (const row of piece) rows.push(row)
    const last = piece.at(-1)
    if (last === undefined || piece.length < rowsAtOnce) return rows
    after = keyOf(last)
    await nextTurn()
  }
}

/** Calls `fn` with every item. */
export async function eachInTurns<Item>(items: Iterable<Item>, fn: (item: Item) => void): Promise<void> {
  let count = 0
  for (const item of items) {
    fn(item)
    count += 1
    if (count % itemsAtOnce === 0) await nextTurn()
  }
}

export async function filterInTurns<Item>(items: Iterable<Item>, test: (item: Item) => boolean): Promise<Item[]> {
  const found: Item[] = []
  await eachInTurns(items, (item) => {
    if (test(item)) found.push(item)
  })
  return found
}

/** The items by their keys; of several with one key the last. */
export async function mapInTurns<Item, Key>(items: Iterable<Item>, keyOf: (item: Item) => Key): Promise<Map<Key, Item>> {
  const map = new Map<Key, Item>()
  await eachInTurns(items, (item) => map.set(keyOf(item), item))
  return map
}
