// Puts the components together, in the order in which they need each other, and takes them apart in the reverse order.
//
// Rules:
// - The home's lock is the first thing taken and the last thing let go.
// - Sockets are opened when everything behind them is ready, and closed first: what answers can be used.
// - A start that fails undoes what it had done.
import { AtollError, newId, openCatalog, systemClock } from '@atoll/core'
import { mkdir } from 'node:fs/promises'
import type { Config, Logger } from '@atoll/core'
import { Engine } from '@atoll/native'
import { drivers } from '@atoll/southbound'
import { openMapper } from '@atoll/mapper'
import { defaultPoolName, openComposer } from '@atoll/composer'
import { serveTemporaryNbd, startNbdServer, type NbdServer } from '@atoll/northbound'
import { createAdminServer, listenAdmin } from './admin/admin-server.ts'
import type { Endpoints } from './endpoints.ts'
import { letGroupPass, lockHome } from './home-directory.ts'
import { startHttpListener } from './http-listener.ts'
import { collectMetrics } from './metrics/collect-metrics.ts'
import { EventLoopMonitor } from './metrics/event-loop.ts'
import { shared } from './metrics/shared.ts'
import { nbdTcpUrl, reachableServer, type NbdTcpServer } from './nbd-tcp-address.ts'
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

/** Things to undo, the last first. A failure to undo one thing does not keep the others. */
class Cleanup {
  private readonly steps: { readonly name: string; readonly undo: () => Promise<void> | void }[] = []
  private readonly log: Logger

  constructor(log: Logger) {
    this.log = log
  }

  add(name: string, undo: () => Promise<void> | void): void {
    this.steps.push({ name, undo })
  }

  /** Returns whether every step succeeded. */
  async run(): Promise<boolean> {
    let succeeded = true
    for (let step = this.steps.pop(); step !== undefined; step = this.steps.pop()) {
      try {
        await step.undo()
      } catch (error) {
        succeeded = false
        this.log.error({ err: error }, `closing the ${step.name} failed`)
      }
    }
    return succeeded
  }
}

/**
 * Starts everything; clients can come when this returns.
 * @throws AtollError HOME_LOCKED, CONFIG_INVALID, TLS_CREDENTIALS_INVALID, LISTEN_FAILED, FORMAT_VERSION, what opening the catalog and the pools throws
 */
export async function startDaemon(config: Config, log: Logger): Promise<Daemon> {
  const cleanup = new Cleanup(log)
  try {
    return await start(config, log, cleanup)
  } catch (error) {
    await cleanup.run()
    throw error
  }
}

async function start(config: Config, log: Logger, cleanup: Cleanup): Promise<Daemon> {
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

  const catalog = await openCatalog(paths.catalog, { ownerText: `pid ${process.pid}` })
  cleanup.add('catalog', () => catalog.close())
  await mkdir(paths.batchLogs, { recursive: true })
  const engine = new Engine({ pageFile: paths.pageFile, batchLogDirectory: paths.batchLogs, ioUring: config.ioUring })
  cleanup.add('engine', () => engine.close())
  const nbdLog = log.child({ part: 'nbd' })
  // Before the pools are opened: a certificate that cannot be used should not take long to hear of.
  const credentials =
    config.nbd === null || config.nbdTls === null
      ? null
      : await loadTlsCredentials({ engine, directory: config.nbdTls, verifyClients: config.nbdTlsVerify, log: nbdLog, clock })
  const mapper = await openMapper({ catalog, engine, drivers, log: log.child({ part: 'mapper' }), clock, newId })
  cleanup.add('mapper', () => mapper.close())
  const composer = await openComposer({
    mapper,
    catalog,
    engine,
    log: log.child({ part: 'composer' }),
    home,
    serveTemporaryNbd: (exports, options) => serveTemporaryNbd(engine, exports, { ...options, log: nbdLog }),
    nbdSocketPath: paths.nbdSocket,
    imageFetch: { allowPrivate: config.allowPrivateImageSources },
    clock,
    newId,
  })
  cleanup.add('composer', () => composer.close())
  await composer.pools.createFirst({ name: defaultPoolName, driver: 'file', options: { path: paths.defaultPool } })

  const stopping = new AbortController()
  const endpoints: { -readonly [Name in keyof Endpoints]: Endpoints[Name] } = {
    home,
    http: null,
    nbd: null,
    nbdSocket: null,
    iscsi: null,
  }
  const nbdServers: NbdServer[] = []
  if (config.nbdSocket) {
    const nbd = await startNbdServer({
      engine,
      exports: composer.exports,
      log: nbdLog,
      listen: { path: paths.nbdSocket, mode: 0o660, ...(groupId === undefined ? {} : { groupId }) },
    })
    cleanup.add('NBD server', () => nbd.close())
    nbdServers.push(nbd)
    endpoints.nbdSocket = paths.nbdSocket
  }
  let nbdTcp: NbdTcpServer | null = null
  if (config.nbd !== null) {
    const nbd = await startNbdServer({
      engine,
      exports: composer.exports,
      log: nbdLog,
      listen: config.nbd,
      listing: config.nbdList,
      ...(credentials === null ? {} : { tls: { mode: 'required', config: credentials.current } }),
    })
    cleanup.add('NBD server on TCP', () => nbd.close())
    nbdServers.push(nbd)
    const port = nbd.address.port ?? config.nbd.port
    nbdTcp = reachableServer(config.nbd, port, credentials !== null)
    endpoints.nbd = nbdTcpUrl({ ...nbdTcp, host: config.nbd.host })
    if (credentials === null)
      nbdLog.warn({ nbd: endpoints.nbd }, 'NBD over TCP goes in the clear: everybody who reaches it is let in')
  }
  cleanup.add('NBD clients', async () => void (await Promise.all(nbdServers.map((nbd) => nbd.drain()))))
  const eventLoop = new EventLoopMonitor()
  cleanup.add('event loop monitor', () => eventLoop.close())
  const sources = { composer, engine, clock, startedAtMs, catalogPath: paths.catalog, eventLoop }
  const metrics = (): Promise<string> => collectMetrics(sources, { withVolumes: true })
  const context = { composer, engine, clock, endpoints, metrics, nbdTcp, startedAtMs, stopping: stopping.signal }
  const admin = await listenAdmin(createAdminServer(context, log.child({ part: 'admin' })), paths.adminSocket)
  cleanup.add('admin socket', () => admin.close())
  if (config.http !== null) {
    const http = await startHttpListener(config.http, {
      isHealthy: () => !stopping.signal.aborted,
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
