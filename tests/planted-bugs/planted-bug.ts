/** A bug put into a copy of the source on purpose: a test suite that does not fail over it proves nothing. */
import assert from 'node:assert/strict'
import { readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'

export interface PlantedBug {
  /** A sentence about what is wrong. */
  readonly name: string
  readonly edits: readonly Edit[]
  /** Arguments of `cargo test`, or of the crash history; or a file of tests, and options. */
  readonly tests: readonly string[]
}

export interface Edit {
  /** From the root of the checkout. */
  readonly file: string
  /** Stands exactly once in the file. */
  readonly find: string
  readonly replace: string
}

/** Applies the edits of a bug to the tree at `root`; returns how to take them back. @throws AssertionError if a text is not there exactly once */
export async function plant(root: string, bug: PlantedBug): Promise<() => Promise<void>> {
  const originals = new Map<string, string>()
  for (const edit of bug.edits) {
    const path = join(root, edit.file)
    const text = await readFile(path, 'utf8')
    if (!originals.has(path)) originals.set(path, text)
    assert.equal(
      text.split(edit.find).length - 1,
      1,
      `planted bug "${bug.name}": its text must stand exactly once in ${edit.file}`,
    )
    await writeFile(
      path,
      text.replace(edit.find, () => edit.replace),
    )
  }
  return async () => {
    for (const [path, text] of originals) await writeFile(path, text)
  }
}
