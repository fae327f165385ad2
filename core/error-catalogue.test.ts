import { execFileSync } from 'node:child_process'
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { errorCatalogue, findErrorEntry } from './error-catalogue.ts'

const root = join(import.meta.dirname, '..')

/** Tests may invent codes; the NBD client is a package of its own with errors of its own. */
const isOutside = (path: string): boolean =>
  path === 'core/error-catalogue.ts' ||
  /\.test\.ts$|\/(?:testing|tests|fixtures)\/|^tests\/|\/tests\.rs$|^southbound\/nbd\/client\//.test(path)

/** Sources that git knows: TypeScript, and the Rust of the engine. */
const sources = execFileSync('git', ['ls-files', '-z', '--', '*.ts', 'native/*.rs'], { cwd: root, encoding: 'utf8' })
  .split('\0')
  .filter((path) => path !== '' && !isOutside(path))
  .flatMap((path) => {
    try {
      return [{ path, text: readFileSync(join(root, path), 'utf8') }]
    } catch {
      // Deleted but not committed yet.
      return []
    }
  })

/** Where errors are made: by constructors in TypeScript; in Rust whatever is written like a code is one. */
const making = {
  ts: [/\bAtollError\(\s*'([A-Z][A-Z0-9_]*)'/g, /\bsuper\(\s*'([A-Z][A-Z0-9_]*)'/g],
  rs: [/(?<!env!\(|var\(|var_os\()"([A-Z]+(?:_[A-Z]+)+)"/g],
}

describe('the catalogue of errors', () => {
  test('has every code that the sources make', () => {
    const missing = sources.flatMap(({ path, text }) =>
      making[path.endsWith('.ts') ? 'ts' : 'rs'].flatMap((pattern) =>
        [...text.matchAll(pattern)].flatMap(([, code]) =>
          code !== undefined && findErrorEntry(code) === undefined ? [`${path}: ${code}`] : [],
        ),
      ),
    )
    expect(missing).toEqual([])
  })

  test('has no code that the sources do not know', () => {
    const known = new Set(sources.flatMap(({ text }) => [...text.matchAll(/['"]([A-Z][A-Z0-9_]+)['"]/g)].map(([, code]) => code)))
    expect(Object.keys(errorCatalogue).filter((code) => !known.has(code))).toEqual([])
  })

  test('says of each code what it means, what to do, and an HTTP status', () => {
    for (const [code, { meaning, action, httpStatus }] of Object.entries(errorCatalogue)) {
      expect(code).toMatch(/^[A-Z]+(?:_[A-Z]+)*$/)
      expect(meaning).toMatch(/^\S.*\.$/)
      expect(action).toMatch(/^\S.*\.$/)
      expect(httpStatus).toBeGreaterThanOrEqual(400)
      expect(httpStatus).toBeLessThan(600)
    }
  })

  test('does not find what objects have by themselves', () => {
    expect(findErrorEntry('constructor')).toBeUndefined()
    expect(findErrorEntry('INTERNAL')?.httpStatus).toBe(500)
  })
})
