import { expect, test } from 'vitest'
import { findAmbientUses } from './check-ambient.ts'

function usesIn(path: string, text: string): string[] {
  return findAmbientUses([{ path, text }])
}

test.each([
  'Date.now()',
  'new Date()',
  'performance.now()',
  'process.hrtime.bigint()',
  'Math.random()',
  'randomUUID()',
  'crypto.getRandomValues(x)',
])('%s in product code is caught, with its line', (call) => {
  const [violation] = usesIn('mapper/mapper.ts', `const a = 1\nconst b = ${call}\n`)
  expect(violation).toContain('mapper/mapper.ts:2: ')
  expect(violation).toContain('handed in')
})

test('tests, comments and the files that make the sources may', () => {
  expect(usesIn('mapper/mapper.test.ts', 'Date.now()')).toEqual([])
  expect(usesIn('tests/crash.ts', 'Math.random()')).toEqual([])
  expect(usesIn('core/clock.ts', 'Date.now()')).toEqual([])
  expect(usesIn('mapper/mapper.ts', '// not Date.now()\n/* nor\n * Math.random()\n */\n')).toEqual([])
  expect(usesIn('mapper/mapper.ts', 'new Date(row.created_at)')).toEqual([])
})
