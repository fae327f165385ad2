// Where every command of a release begins: short ones are in a file of their own (commands-bundle.ts). What Node compiled is kept in the
// user's cache, if that is nobody else's to write.
'use strict'
const { mkdirSync, statSync } = require('node:fs')
const { enableCompileCache } = require('node:module')
const { join } = require('node:path')

function cacheFolder() {
  const parent = process.env.XDG_CACHE_HOME || (process.env.HOME ? join(process.env.HOME, '.cache') : '')
  if (!parent.startsWith('/')) return null
  const folder = join(parent, 'atoll')
  try {
    mkdirSync(folder, { recursive: true, mode: 0o700 })
    const { uid, mode } = statSync(folder)
    return uid === process.getuid() && (mode & 0o022) === 0 ? folder : null
  } catch {
    return null
  }
}

const cache = cacheFolder()
if (cache !== null) enableCompileCache(cache)

/** Groups with commands that need more than the short ones. The word may be the name of a volume as well, which then takes longer. */
const long = ['serve', 'catalog']

const args = process.argv.slice(2)
if (args.some((word) => long.includes(word))) void import('./main.js')
else void require('./commands.cjs').load().run(args)
