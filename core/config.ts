/**
 * Settings of the daemon: defaults, then `atoll.yaml` in the home, then flags; the later wins. Unknown names are errors,
 * because a misspelt setting that is silently ignored is worse than one that stops the start.
 */
import { readFile } from 'node:fs/promises'
import { join, resolve } from 'node:path'
import { parse } from 'yaml'
import { z } from 'zod'
import { AtollError } from './errors.ts'
import { logLevels } from './logging.ts'

/** A TCP address to listen on; port 0 picks a free one. */
export interface ListenAddress {
  host: string
  port: number
}

const addressPattern = /^(?:\[(?<v6>[0-9a-fA-F:.%]+)\]|(?<host>[^:[\]\s]*)):(?<port>\d{1,5})$/

/**
 * Reads `HOST:PORT`, `[V6]:PORT`, `:PORT` (loopback) or `off` (null).
 * @throws AtollError CONFIG_INVALID with the text
 */
export function parseListenAddress(text: string): ListenAddress | null {
  if (text === 'off') return null
  const groups = addressPattern.exec(text)?.groups
  const port = Number(groups?.port)
  if (groups === undefined || port > 65_535) {
    throw new AtollError('CONFIG_INVALID', `"${text}" is not an address: HOST:PORT, [V6]:PORT, :PORT or "off" is wanted`, {
      values: { value: text },
    })
  }
  return { host: groups.v6 ?? (groups.host || '127.0.0.1'), port }
}

const listenAddress = z.string().transform((text, context): ListenAddress | null => {
  try {
    return parseListenAddress(text)
  } catch (error) {
    context.addIssue({ code: 'custom', message: (error as Error).message })
    return z.NEVER
  }
})

/** `off` and `on` are strings for YAML 1.2, and true and false are what others write. */
const onOff = z.union([z.boolean(), z.enum(['on', 'off']).transform((text) => text === 'on')])

/** What `atoll.yaml` may hold, and what flags give under the same names. */
const settingsSchema = z.strictObject({
  /** HOST:PORT of the HTTP APIs, or off. */
  http: listenAddress.prefault('127.0.0.1:8776'),
  /** Whether the NBD unix socket is served. */
  nbdSocket: onOff.prefault('on'),
  /** HOST:PORT of NBD over TCP, or off. Wants `nbdTls` or `nbdInsecure`. */
  nbd: listenAddress.prefault('off'),
  /** Folder with ca-cert.pem, server-cert.pem and server-key.pem, relative to the home; null: none. */
  nbdTls: z.string().min(1).nullable().prefault(null),
  /** Whether clients over TLS need a certificate of the authority in ca-cert.pem. */
  nbdTlsVerify: onOff.prefault('on'),
  /** NBD over TCP in the clear: whoever reaches the port reads and writes every attached volume. */
  nbdInsecure: onOff.prefault('off'),
  /** Whether clients over TCP are told which exports there are. */
  nbdList: onOff.prefault('off'),
  /** Group that may open the NBD socket, by name or number; null: the daemon's own. */
  socketGroup: z
    .union([z.string().min(1), z.int().min(0).transform(String)])
    .nullable()
    .prefault(null),
  /** What links and catalogs carry instead of the HTTP address; null: the address itself. */
  publicUrl: z
    .url({ protocol: /^https?$/ })
    .nullable()
    .prefault(null),
  /** The catalog's file; null: catalog.db in the home. */
  catalog: z.string().min(1).nullable().prefault(null),
  /** Whether images may be fetched over HTTP from addresses that are not public: loopback, private networks, link-local. */
  allowPrivateImageSources: onOff.prefault('off'),
  /** Whether reads wait for disks over io_uring where the kernel allows it; off: on threads. */
  ioUring: onOff.prefault('on'),
  logLevel: z.enum([...logLevels, 'silent']).prefault('info'),
})

/** Flags and the file, before they are checked. */
export type Settings = z.input<typeof settingsSchema>

export interface Config {
  /** Absolute. */
  home: string
  http: ListenAddress | null
  nbdSocket: boolean
  nbd: ListenAddress | null
  /** Absolute. */
  nbdTls: string | null
  nbdTlsVerify: boolean
  nbdInsecure: boolean
  nbdList: boolean
  socketGroup: string | null
  publicUrl: string | null
  allowPrivateImageSources: boolean
  ioUring: boolean
  logLevel: z.output<typeof settingsSchema>['logLevel']
  /** The catalog was named, so that others may have it, too: this daemon then stands by while another one is active. */
  sharesCatalog: boolean
  paths: HomePaths
}

/** Where things lie in a home. */
export interface HomePaths {
  catalog: string
  config: string
  nbdSocket: string
  adminSocket: string
  pageFile: string
  /** Folder of what was answered but not flushed. */
  batchLogs: string
  /** Folder of the file pool `default`. */
  defaultPool: string
}

/** The paths of a home; `catalog` may lie elsewhere. */
export function homePaths(home: string, catalog: string | null = null): HomePaths {
  return {
    catalog: catalog === null ? join(home, 'catalog.db') : resolve(home, catalog),
    config: join(home, 'atoll.yaml'),
    nbdSocket: join(home, 'nbd.sock'),
    adminSocket: join(home, 'admin.sock'),
    pageFile: join(home, 'pages.cache'),
    batchLogs: join(home, 'batch-logs'),
    defaultPool: join(home, 'pools', 'default'),
  }
}

/** The home: --home, then ATOLL_HOME, then `.atoll` in the current directory. */
export function resolveHome(flag: string | undefined, environment: NodeJS.ProcessEnv, currentDirectory: string): string {
  return resolve(currentDirectory, flag ?? (environment.ATOLL_HOME || '.atoll'))
}

/** How a flag is called, for messages: nbdSocket -> --nbd-socket. */
const flagName = (name: string): string => `--${name.replaceAll(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`)}`

/**
 * Checks the settings of a home. `file` is the text of `atoll.yaml`, or null if there is none; undefined flags do not count.
 * @throws AtollError CONFIG_INVALID naming the setting, where it stands, its value and what is allowed
 */
export function resolveConfig(home: string, file: string | null, flags: Settings = {}): Config {
  const paths = homePaths(home)
  const fromFile = file === null ? {} : parseFile(file, paths.config)
  const given = Object.fromEntries(Object.entries(flags).filter(([, value]) => value !== undefined))
  const checked = settingsSchema.safeParse({ ...fromFile, ...given })
  if (!checked.success) {
    const problems = checked.error.issues.flatMap((issue) => {
      const names = issue.code === 'unrecognized_keys' ? issue.keys : [String(issue.path[0])]
      return names.map((name) => {
        const where = name in given ? flagName(name) : `"${name}" in ${paths.config}`
        const what = issue.code === 'unrecognized_keys' ? 'there is no such setting' : issue.message
        return `${where}: ${what}`
      })
    })
    throw new AtollError('CONFIG_INVALID', problems.join('; '), { values: { problems } })
  }
  const { catalog, nbdTls, ...settings } = checked.data
  checkNbd(settings.nbd, nbdTls, settings.nbdInsecure)
  return {
    home,
    ...settings,
    nbdTls: nbdTls === null ? null : resolve(home, nbdTls),
    sharesCatalog: catalog !== null,
    paths: homePaths(home, catalog),
  }
}

/**
 * Over TCP anybody who reaches the port is a client, also every user and every guest of this machine: without TLS it must have been
 * asked for by name.
 */
function checkNbd(nbd: ListenAddress | null, tls: string | null, insecure: boolean): void {
  if (nbd === null) return
  const address = `${nbd.host}:${nbd.port}`
  if (tls === null && !insecure) {
    throw new AtollError(
      'CONFIG_INVALID',
      `NBD on ${address} would let everybody who reaches it read and write every attached volume: give --nbd-tls DIR with ` +
        'certificates (the README shows how to make them), or say --nbd-insecure if the network is trusted',
      { values: { address } },
    )
  }
  if (tls !== null && insecure) {
    throw new AtollError(
      'CONFIG_INVALID',
      `--nbd-tls ${tls} and --nbd-insecure contradict each other: choose one for NBD on ${address}`,
      {
        values: { address, nbdTls: tls },
      },
    )
  }
}

function parseFile(text: string, path: string): Record<string, unknown> {
  let content: unknown
  try {
    content = parse(text, { maxAliasCount: 0 })
  } catch (error) {
    throw new AtollError('CONFIG_INVALID', `${path} is not YAML: ${(error as Error).message}`, { cause: error, values: { path } })
  }
  if (content === null || content === undefined) return {}
  if (typeof content !== 'object' || Array.isArray(content)) {
    throw new AtollError('CONFIG_INVALID', `${path} must hold settings as "name: value" lines`, { values: { path } })
  }
  return content as Record<string, unknown>
}

/** Reads `atoll.yaml` of the home, if there is one, and checks everything. @throws AtollError CONFIG_INVALID */
export async function loadConfig(home: string, flags: Settings = {}): Promise<Config> {
  const path = homePaths(home).config
  let file: string | null = null
  try {
    file = await readFile(path, 'utf8')
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') {
      throw new AtollError('CONFIG_INVALID', `${path} cannot be read: ${(error as Error).message}`, {
        cause: error,
        values: { path },
      })
    }
  }
  return resolveConfig(home, file, flags)
}
