// Where every command of a checkout begins. JavaScript, because what strips types has to be loaded before the first TypeScript file,
// and that takes longer than Node's own start.
//
// Short commands are run from one file, which set-up makes of their sources (release/commands-bundle.ts): loading a module costs more
// than most of what is in them. It is believed only if each of these sources still is what it was made of; else, and where
// there is none, the sources are run. The daemon always runs from its sources.
'use strict'
const { enableCompileCache } = require('node:module')
const { join } = require('node:path')

const cache = join(__dirname, '..', 'node_modules', '.cache', 'atoll')
// Also what was stripped once is not stripped again. Where nothing can be written, that is no error.
enableCompileCache(cache)

/** Groups with commands that need more than the bundle has. The word may be the name of a volume as well, which then takes longer. */
const notBundled = ['serve', 'catalog']

function findBundle() {
  const args = process.argv.slice(2)
  if (args.some((word) => notBundled.includes(word))) return null
  try {
    const bundle = require(join(cache, 'commands.cjs'))
    return bundle.isFresh() ? bundle : null
  } catch {
    return null
  }
}

const bundle = findBundle()
if (bundle === null) void import('./main.ts')
else void bundle.load().run(process.argv.slice(2))
