// The TypeScript sources of the repository, as the checks of this folder see them.
import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'

export interface SourceFile {
  /** Path from the root, with forward slashes. */
  readonly path: string
  readonly text: string
}

const ignoredFolders = new Set(['node_modules', 'target', '.git', '.atoll', '.build', '.vitest', 'fixtures'])

/** Every `.ts` file below `root`, sorted by path; generated declarations (`.d.ts`) are left out. */
export function readSourceFiles(root: string): SourceFile[] {
  const files: SourceFile[] = []
  const visit = (folder: string): void => {
    for (const entry of readdirSync(join(root, folder), { withFileTypes: true })) {
      const path = folder === '' ? entry.name : `${folder}/${entry.name}`
      if (entry.isDirectory()) {
        if (!ignoredFolders.has(entry.name)) visit(path)
      } else if (entry.name.endsWith('.ts') && !entry.name.endsWith('.d.ts')) {
        files.push({ path, text: readFileSync(join(root, path), 'utf8') })
      }
    }
  }
  visit('')
  return files.toSorted((a, b) => (a.path < b.path ? -1 : 1))
}

// Tests, suites that tests of several packages run (`driver-contract.ts`), and what only tests are made of.
const testFile = /^tests\/|\/testing\/|\/test-[^/]+\.ts$|(?:\.test|-contract)\.ts$/

/** True for files that only tests load: they may use what product code may not. */
export function isTestFile(path: string): boolean {
  return testFile.test(path)
}

/** The 1-based line of a character index. */
export function lineOf(text: string, index: number): number {
  let line = 1
  for (let at = text.indexOf('\n'); at !== -1 && at < index; at = text.indexOf('\n', at + 1)) line += 1
  return line
}
