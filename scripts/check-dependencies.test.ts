import { describe, expect, test } from 'vitest'
import { findViolations, importsOf } from './check-dependencies.ts'
import type { Tree } from './check-dependencies.ts'
import { packageRules } from './dependency-rules.ts'

/** A tree of one file in which everything is declared, so that only the rule under test can fail. */
function treeWith(path: string, text: string): Tree {
  const ours = Object.fromEntries(Object.keys(packageRules).map((name) => [name, '0.1.0']))
  const manifests = Object.fromEntries(
    Object.entries(packageRules).map(([name, rule]) => [
      rule.folder,
      { name, exports: { '.': './index.ts' }, dependencies: ours },
    ]),
  )
  return { files: [{ path, text }], manifests: { ...manifests, '': { devDependencies: { vitest: '1' } } } }
}

function violationsOf(path: string, text: string): string[] {
  return findViolations(treeWith(path, text))
}

describe('the direction of dependencies', () => {
  test('going down is allowed', () => {
    expect(
      violationsOf(
        'cli/daemon/daemon.ts',
        `import { openComposer } from '@atoll/composer'\nimport { openMapper } from '@atoll/mapper'\n`,
      ),
    ).toEqual([])
    expect(violationsOf('mapper/mapper.ts', `import { Engine } from '@atoll/native'\n`)).toEqual([])
  })

  test.each([
    ['core/errors.ts', '@atoll/native'],
    ['southbound/file/file-driver.ts', '@atoll/mapper'],
    ['mapper/mapper.ts', '@atoll/composer'],
    ['composer/composer.ts', '@atoll/northbound'],
    ['composer/composer.ts', '@atoll/cli'],
    ['northbound/nbd/server.ts', '@atoll/mapper'],
    ['native/index.ts', '@atoll/southbound'],
    ['southbound/nbd/client/client.ts', '@atoll/core'],
    ['tests/crash.test.ts', '@atoll/cli'],
  ])('%s importing %s is caught, with the reason', (path, target) => {
    const [violation, ...others] = violationsOf(path, `// first line\nimport { x } from '${target}'\n`)
    expect(others).toEqual([])
    expect(violation).toContain(`${path}:2: `)
    expect(violation).toContain(`may not import ${target}: `)
  })

  test('a type import, a re-export and a dynamic import count like any other', () => {
    for (const text of [
      `import type { Composer } from '@atoll/composer'`,
      `export * from '@atoll/composer'`,
      `export { Composer } from '@atoll/composer'`,
      `const composer = await import('@atoll/composer')`,
      `import {\n  Composer,\n  openComposer,\n} from '@atoll/composer'`,
      `import '@atoll/composer'`,
    ]) {
      expect(violationsOf('mapper/mapper.ts', `${text}\n`), text).toHaveLength(1)
    }
  })

  test('a test may use the packages below its own, and the NBD client', () => {
    const text = `import { x } from '@atoll/southbound'\nimport { y } from '@atoll/nbd-client'\n`
    expect(violationsOf('northbound/nbd/server.test.ts', text)).toEqual([])
    expect(violationsOf('northbound/nbd/server.ts', text)).toHaveLength(2)
    expect(violationsOf('mapper/mapper.test.ts', `import { z } from '@atoll/composer'\n`)).toHaveLength(1)
  })
})

describe('the borders of a package', () => {
  test('a relative import of another package is caught', () => {
    expect(violationsOf('composer/composer.ts', `import { x } from '../mapper/mapper.ts'\n`)[0]).toContain(
      "another package's inside",
    )
    expect(violationsOf('southbound/nbd/client/client.ts', `import { x } from '../../driver.ts'\n`)).toHaveLength(1)
    expect(violationsOf('composer/jobs/jobs.ts', `import { x } from '../resolve.ts'\n`)).toEqual([])
  })

  test('an entry that is not among the exports is caught', () => {
    expect(violationsOf('composer/composer.ts', `import { x } from '@atoll/mapper/maps.ts'\n`)[0]).toContain('exports')
  })

  test('an import that is not declared is caught', () => {
    expect(violationsOf('core/config.ts', `import { parse } from 'left-pad'\n`)[0]).toContain(
      'core/package.json does not declare',
    )
    expect(violationsOf('core/config.test.ts', `import { test } from 'vitest'\n`)).toEqual([])
    expect(violationsOf('core/config.ts', `import { test } from 'vitest'\n`)).toHaveLength(1)
  })

  test("Node's own modules are written with node:", () => {
    expect(violationsOf('core/config.ts', `import { readFile } from 'fs/promises'\n`)[0]).toContain('write node:fs/promises')
    expect(violationsOf('core/config.ts', `import { readFile } from 'node:fs/promises'\n`)).toEqual([])
  })
})

describe('the compiled addon', () => {
  test.each([
    `const addon = require('../native/atoll.linux-x64.node')`,
    `process.dlopen(module, path)`,
    `import { createRequire } from 'node:module'`,
  ])('%s is caught outside of its one door', (text) => {
    expect(violationsOf('mapper/mapper.ts', `${text}\n`).join('\n')).toContain('only native/addon.ts may')
  })

  test('its door may load it', () => {
    expect(
      violationsOf('native/addon.ts', `import { createRequire } from 'node:module'\nprocess.dlopen(module, 'x.node')\n`),
    ).toEqual([])
  })
})

test('what only talks about an import is none', () => {
  expect(importsOf(`// import { x } from 'y'\n * export { a } from 'b'\nconst text = 'import from'\n`)).toEqual([])
})
