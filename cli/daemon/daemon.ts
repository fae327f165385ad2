// Puts the components together, in the order in which they need each other, and takes them apart in the reverse order.
//
// Rules:
// - The home's lock is the first thing taken and the last thing let go.
// - Sockets are opened when everything behind them is ready, and closed first: what answers can be used. While the daemon stands by
//   (ownership.ts) there is nothing behind the sockets of NBD, so they are not there.
// - A start that fails undoes what it had done.
import { AtollError, isAtollError, systemClock } from '@atoll/core'
import { mkdir } from 'node:fs/promises'
import type { Config, Logger } from '@atoll/core'
import { checkTakeOver } from '@atoll/composer'
import { Engine } from '@atoll/native'
import { drivers } from '@atoll/southbound'
import { openActiveParts } from './active-parts.ts'
import type { AdminContext } from './admin/admin-context.ts'
import { createAdminServer, listenAdmin } from './admin/admin-server.ts'
import { batchLogId } from './batch-log-id.ts'
import { Cleanup } from './cleanup.ts'
import type { Endpoints } from './endpoints.ts'
import { letGroupPass, lockHome } from './home-directory.ts'
import { startHttpListener } from './http-listener.ts'
import { collectMetrics } from './metrics/collect-metrics.ts'
import { EventLoopMonitor } from './metrics/event-loop.ts'
import { shared } from './metrics/shared.ts'
import { composerWhenActive, Ownership } from './ownership.ts'
import { checkSocketPath, findGroupId, removeStaleSocket } from './socket-files.ts'
import { loadTlsCredentials } from './tls-credentials.ts'

export interface Daemon {
  readonly endpoints: Endpoints
  /** Reads the certificates again; null: there are none. @throws AtollError TLS_CREDENTIALS_INVALID; the old ones stay then */
  readonly reloadTls: (() => Promise<void>) | null
  /** Takes no more requests, finishes those in flight, makes everything durable. Call it once. */
  stop(): Promise<void>
}

/** Whoever reaches the HTTP listener may ask for metrics as often as he likes; they are collected this often at most. */
const metricsKeepMs = 1000

/**
 * Starts everything; clients can come when this returns. A daemon that shares its catalog stands by if another one is active.
 * `onTakenOver`: another daemon has taken the catalog over, so this process must end at once.
 * @throws AtollError HOME_LOCKED, CONFIG_INVALID, TLS_CREDENTIALS_INVALID, LISTEN_FAILED, FORMAT_VERSION, what opening the catalog and the pools throws
 */
export async function startDaemon(
  config: Config,
  log: Logger,
  { onTakenOver }: { onTakenOver: (error: AtollError) => void },
): Promise<Daemon> {
  const cleanup = new Cleanup(log)
  try {
    return await start(config, log, { cleanup, onTakenOver })
  } catch (error) {
    await cleanup.run()
    throw error
  }
}

async function start(
  config: Config,
  log: Logger,
  { cleanup, onTakenOver }: { cleanup: Cleanup; onTakenOver: (error: AtollError) => void },
): Promise<Daemon> {
  const { home, paths } = config
  const clock = systemClock
  const startedAtMs = clock.monotonicMs()
  checkSocketPath(paths.adminSocket)
  checkSocketPath(paths.nbdSocket)
  const groupId = config.socketGroup === null ? undefined : await findGroupId(config.socketGroup)

  const lock = lockHome(home)
  cleanup.add('lock of the home', () => lock.release())
  if (groupId !== undefined) await letGroupPass(home, groupId)
  await removeStaleSocket(paths.adminSocket)
  await removeStaleSocket(paths.nbdSocket)

  await mkdir(paths.batchLogs, { recursive: true })
  const engine = new Engine({ pageFile: paths.pageFile, batchLogDirectory: paths.batchLogs, ioUring: config.ioUring })
  cleanup.add('engine', () => engine.close())
  // Before the pools are opened: a certificate that cannot be used should not take long to hear of.
  const credentials =
    config.nbd === null || config.nbdTls === null
      ? null
      : await loadTlsCredentials({
          engine,
          directory: config.nbdTls,
          verifyClients: config.nbdTlsVerify,
          log: log.child({ part: 'nbd' }),
          clock,
        })
  const stopping = new AbortController()
  const endpoints: { -readonly [Name in keyof Endpoints]: Endpoints[Name] } = {
    home,
    http: null,
    nbd: null,
    nbdSocket: null,
    iscsi: null,
  }
  const active = { config, log, clock, engine, groupId, credentials, onTakenOver, batchLogId: await batchLogId(paths.batchLogs) }
  const ownership = new Ownership({
    catalogPath: paths.catalog,
    log,
    open: async (how) => await openActiveParts(active, how),
    onActive: ({ nbd, nbdSocket }) => {
      Object.assign(endpoints, { nbd, nbdSocket })
      log.info({ nbd, nbdSocket, catalog: paths.catalog }, 'active')
    },
    checkTakeOver: async (volume, scope) =>
      await checkTakeOver({ catalogPath: paths.catalog, engine, drivers, clock }, volume, scope),
  })
  cleanup.add('volumes', () => ownership.close())
  try {
    await ownership.start()
  } catch (error) {
    if (!config.sharesCatalog || !isAtollError(error, 'CATALOG_LOCKED')) throw error
    ownership.standBy(error)
  }
  const eventLoop = new EventLoopMonitor()
  cleanup.add('event loop monitor', () => eventLoop.close())
  const sources = { ownership, engine, clock, startedAtMs, catalogPath: paths.catalog, eventLoop }
  const metrics = (): Promise<string> => collectMetrics(sources, { withVolumes: true })
  const context: AdminContext = {
    composer: composerWhenActive(ownership),
    ownership,
    engine,
    clock,
    catalogPath: paths.catalog,
    endpoints,
    metrics,
    get nbdTcp() {
      return ownership.parts?.nbdTcp ?? null
    },
    startedAtMs,
    stopping: stopping.signal,
  }
  const admin = await listenAdmin(createAdminServer(context, log.child({ part: 'admin' })), paths.adminSocket)
  cleanup.add('admin socket', () => admin.close())
  if (config.http !== null) {
    const http = await startHttpListener(config.http, {
      status: () => (stopping.signal.aborted ? 'stopping' : ownership.parts === null ? 'standby' : 'ok'),
      metrics: shared({ clock, keepMs: metricsKeepMs }, () => collectMetrics(sources, { withVolumes: false })),
    })
    cleanup.add('HTTP listener', () => http.close())
    endpoints.http = http.url
  }
  cleanup.add('waiting requests', () => stopping.abort())

  log.info({ ...endpoints, startedInMs: Math.round(clock.monotonicMs() - startedAtMs) }, 'ready')
  return {
    endpoints,
    reloadTls: credentials === null ? null : () => credentials.reload(),
    stop: async () => {
      if (!(await cleanup.run())) throw new AtollError('INTERNAL', 'the daemon could not be stopped cleanly; the log says why')
    },
  }
}
