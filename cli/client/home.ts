import { join, resolve } from 'node:path'

/** The directory of the checkout this program runs from. */
export const checkoutRoot = join(import.meta.dirname, '..', '..')

/** The home of the daemon: the option, else `ATOLL_HOME`, else `.atoll` in the checkout. Always absolute. */
export function resolveHome(option: string | undefined): string {
  return resolve(option ?? (process.env['ATOLL_HOME'] || join(checkoutRoot, '.atoll')))
}

export function adminSocketPath(home: string): string {
  return join(home, 'admin.sock')
}
