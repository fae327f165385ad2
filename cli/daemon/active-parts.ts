// What a daemon has while it is active on its catalog: the catalog itself, mapper and composer over it, and the NBD servers.
import { realpath } from 'node:fs/promises'
import { hostname } from 'node:os'
import { dirname } from 'node:path'
import { newId, openCatalog, type AtollError, type Catalog, type Clock, type Config, type Logger } from '@atoll/core'
import { defaultPoolName, openComposer, type Composer } from '@atoll/composer'
import { openMapper } from '@atoll/mapper'
import type { Engine } from '@atoll/native'
import { serveTemporaryNbd, startNbdServer, type NbdServer } from '@atoll/northbound'
import { drivers } from '@atoll/southbound'
import { Cleanup } from './cleanup.ts'
import { nbdTcpUrl, reachableServer, type NbdTcpServer } from './nbd-tcp-address.ts'
import type { TlsCredentials } from './tls-credentials.ts'

export interface ActiveOptions {
  readonly config: Config
  readonly log: Logger
  readonly clock: Clock
  readonly engine: Engine
  readonly groupId: number | undefined
  /** Of NBD over TCP; null: in the clear. */
  readonly credentials: TlsCredentials | null
  /** See `batchLogId`. */
  readonly batchLogId: string
  /** Another daemon took the catalog over: this one must end at once. */
  readonly onTakenOver: (error: AtollError) => void
}

export interface ActiveParts {
  readonly catalog: Catalog
  readonly composer: Composer
  /** Where the unix socket is; null is off. */
  readonly nbdSocket: string | null
  /** URL of NBD over TCP, with the address that it listens on; null is off. */
  readonly nbd: string | null
  readonly nbdTcp: NbdTcpServer | null
  /** Takes no more requests, finishes those in flight, makes everything durable. Returns whether all of that succeeded. */
  close(): Promise<boolean>
}

/**
 * Becomes the owner of the catalog and starts what works on it. `takeOver`: although another daemon is the owner; what that one
 * has of pools that can shut it out is taken, too.
 * @throws AtollError CATALOG_LOCKED naming the owner, ADDRESS_IN_USE before the catalog is taken, and what opening catalog and pools throws;
 * nothing runs then
 */
export async function openActiveParts(options: ActiveOptions, { takeOver }: { takeOver: boolean }): Promise<ActiveParts> {
  const cleanup = new Cleanup(options.log)
  try {
    return await open(options, takeOver, cleanup)
  } catch (error) {
    await cleanup.run()
    throw error
  }
}

async function open(options: ActiveOptions, takeOver: boolean, cleanup: Cleanup): Promise<ActiveParts> {
  const { config, log, clock, engine, groupId, credentials } = options
  const { home, paths } = config
  const catalog = await openCatalog(paths.catalog, {
    ownerText: `pid ${process.pid} on ${hostname()}, home ${home}, since ${new Date(clock.nowMs()).toISOString()}`,
    takeOver,
    onTakenOver: options.onTakenOver,
    beforeOwning: async () => await requireListenable(engine, config.nbd),
  })
  cleanup.add('catalog', () => catalog.close())
  const mapper = await openMapper({
    catalog,
    engine,
    drivers,
    log: log.child({ part: 'mapper' }),
    clock,
    newId,
    batchLogId: options.batchLogId,
    takeOver,
  })
  cleanup.add('mapper', () => mapper.close())
  const nbdLog = log.child({ part: 'nbd' })
  const composer = await openComposer({
    mapper,
    catalog,
    engine,
    log: log.child({ part: 'composer' }),
    home,
    homeKey: await homeKey(home, paths.catalog),
    serveTemporaryNbd: (exports, serving) => serveTemporaryNbd(engine, exports, { ...serving, log: nbdLog }),
    nbdSocketPath: paths.nbdSocket,
    imageFetch: { allowPrivate: config.allowPrivateImageSources },
    clock,
    newId,
  })
  cleanup.add('composer', () => composer.close())
  await composer.pools.createFirst({ name: defaultPoolName, driver: 'file', options: { path: paths.defaultPool } })

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
  }
  let nbdTcp: NbdTcpServer | null = null
  let nbdUrl: string | null = null
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
    nbdUrl = nbdTcpUrl({ ...nbdTcp, host: config.nbd.host })
    if (credentials === null) nbdLog.warn({ nbd: nbdUrl }, 'NBD over TCP goes in the clear: everybody who reaches it is let in')
  }
  cleanup.add('NBD clients', async () => void (await Promise.all(nbdServers.map((nbd) => nbd.drain()))))
  return {
    catalog,
    composer,
    nbdSocket: config.nbdSocket ? paths.nbdSocket : null,
    nbd: nbdUrl,
    nbdTcp,
    close: () => cleanup.run(),
  }
}

/** Who cannot listen is of no use as the owner. @throws AtollError ADDRESS_IN_USE, LISTEN_FAILED */
async function requireListenable(engine: Engine, address: Config['nbd']): Promise<void> {
  if (address === null || address.port === 0) return
  await (await engine.listenTcp(address)).close()
}

/** What attachments of this home carry: empty in the home in which the catalog lies, so that it can be moved with it. */
async function homeKey(home: string, catalogPath: string): Promise<string> {
  const [own, holding] = await Promise.all([realpath(home), realpath(dirname(catalogPath))])
  return own === holding ? '' : own
}
