// Time, randomness and ids are handed in, so that a seed replays a run and a test decides what time it is. This holds
// product code to it: only the files that make the handed-in sources may ask the machine.
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { isTestFile, lineOf, readSourceFiles } from './source-files.ts'
import type { SourceFile } from './source-files.ts'

/** What asks the machine, and what to use instead. */
const ambientSources: readonly { readonly pattern: RegExp; readonly instead: string }[] = [
  { pattern: /\bDate\.now\(/g, instead: 'the Clock that was handed in' },
  { pattern: /\bnew Date\(\s*\)/g, instead: 'the Clock that was handed in' },
  { pattern: /\bperformance\.now\(/g, instead: 'the Clock that was handed in' },
  { pattern: /\bprocess\.hrtime\b/g, instead: 'the Clock that was handed in' },
  { pattern: /\bMath\.random\(/g, instead: 'a source of randomness that was handed in' },
  { pattern: /\b(?:randomUUID|randomBytes|randomInt|getRandomValues)\(/g, instead: 'the newId function that was handed in' },
]

/** Files that may, with the reason. */
const allowed: Readonly<Record<string, string>> = {
  'core/clock.ts': 'makes the clock of the machine',
  'core/ids.ts': 'makes random ids',
  'cli/terminal/upload-progress.ts': 'shows a rate on a terminal',
  'southbound/nbd/client/retrying-connection.ts': 'a library of its own: it measures its own timeouts',
}

/** One sentence per violation, each starting with `path:line: `. Tests, scripts, benchmarks and packing are left out. */
export function findAmbientUses(files: readonly SourceFile[]): string[] {
  const violations: string[] = []
  for (const { path, text } of files) {
    if (isTestFile(path) || /^(?:scripts|bench|release)\//.test(path) || path in allowed) continue
    for (const { pattern, instead } of ambientSources) {
      for (const match of text.matchAll(pattern)) {
        const line = text.slice(text.lastIndexOf('\n', match.index) + 1, match.index)
        if (/^\s*(?:\/\/|\*|\/\*)/.test(line)) continue
        violations.push(
          `${path}:${lineOf(text, match.index)}: ${match[0]} asks the machine: use ${instead}, so that a run can be replayed`,
        )
      }
    }
  }
  return violations
}

if (import.meta.url === pathToFileURL(process.argv[1] ?? '').href) {
  const violations = findAmbientUses(readSourceFiles(join(import.meta.dirname, '..')))
  for (const violation of violations) console.error(violation)
  process.exitCode = violations.length === 0 ? 0 : 1
}
