// The process of the daemon: starts it, says when it is ready, and ends it on a signal.
import { createLog, loadConfig } from '@atoll/core'
import type { Settings } from '@atoll/core'
import { startDaemon } from './daemon.ts'
import type { Daemon } from './daemon.ts'
import { prepareHome } from './home-directory.ts'
import { readyDocument, readyLine } from './endpoints.ts'

export interface ServeOptions {
  /** Absolute. */
  readonly home: string
  /** Print the ready line as JSON. */
  readonly json: boolean
  /** What the command line sets; undefined does not count. */
  readonly settings: Settings
}

/**
 * Serves until SIGTERM or SIGINT; then finishes what is in flight and ends the process with 0. A second signal ends it at once.
 * @throws AtollError when the start fails: nothing runs any more then
 */
export async function serveUntilSignal(options: ServeOptions): Promise<void> {
  await prepareHome(options.home)
  const config = await loadConfig(options.home, options.settings)
  const log = createLog({ level: config.logLevel })

  // An error that nobody handled leaves a state that nobody reasoned about: what is durable is safe, so end and start again.
  const die = (error: unknown, what: string): never => {
    log.fatal({ err: error }, what)
    process.exit(1)
  }
  process.on('uncaughtException', (error) => die(error, 'an error that nothing handled ends the daemon'))
  process.on('unhandledRejection', (error) => die(error, 'a rejected promise that nothing handled ends the daemon'))

  // Signals count from here on: one that comes during the start ends the daemon when it is up.
  const asked = Promise.withResolvers<NodeJS.Signals>()
  let signals = 0
  const onSignal = (signal: NodeJS.Signals): void => {
    signals += 1
    if (signals > 1) {
      log.warn({ signal }, 'a second signal ends the daemon at once; what was flushed is safe')
      process.exit(1)
    }
    asked.resolve(signal)
  }
  process.on('SIGTERM', onSignal)
  process.on('SIGINT', onSignal)

  const daemon: Daemon = await startDaemon(config, log, {
    // Its clients get no answer any more: the other daemon has what they read and write.
    onTakenOver: (error) => die(error, 'another daemon has taken over: this one ends at once'),
  })
  const { reloadTls } = daemon
  if (reloadTls !== null) {
    process.on('SIGHUP', () => {
      reloadTls().then(
        () => log.info('the certificates were read again'),
        (error: unknown) => log.error({ err: error }, 'the certificates could not be read again; the old ones stay in use'),
      )
    })
  }

  const line = options.json
    ? JSON.stringify(readyDocument(daemon.endpoints, process.pid))
    : readyLine(daemon.endpoints, process.pid)
  process.stdout.write(`${line}\n`)

  const signal = await asked.promise
  log.info({ signal }, 'stopping')
  await daemon.stop()
  log.info('stopped')
  process.exit(0)
}
