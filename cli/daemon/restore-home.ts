// Puts a backup of the catalog into a home that nobody serves.
import { loadConfig, restoreCatalog, systemClock } from '@atoll/core'
import type { RestoredCatalog, Settings } from '@atoll/core'
import { lockHome, prepareHome } from './home-directory.ts'

/**
 * Restores the catalog of a home; the one that was there is kept beside it.
 * @throws AtollError HOME_LOCKED while a daemon serves the home, CONFIG_INVALID, and what `restoreCatalog` throws
 */
export async function restoreHome(options: { home: string; source: string; settings: Settings }): Promise<RestoredCatalog> {
  const { home, source, settings } = options
  await prepareHome(home)
  const { paths } = await loadConfig(home, settings)
  const lock = lockHome(home)
  try {
    const ownerText = `pid ${process.pid}, which restores a backup`
    return await restoreCatalog({ source, path: paths.catalog, ownerText, nowMs: systemClock.nowMs() })
  } finally {
    lock.release()
  }
}
