import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { version } from './version.ts'

test('the version is that of every package', () => {
  const root = join(import.meta.dirname, '..')
  const read = (folder: string): { version: string; workspaces?: string[]; private: boolean } =>
    JSON.parse(readFileSync(join(root, folder, 'package.json'), 'utf8'))
  const top = read('.')
  expect(top.version).toBe(version)
  for (const folder of top.workspaces ?? []) expect(read(folder), folder).toMatchObject({ version, private: true })
})
