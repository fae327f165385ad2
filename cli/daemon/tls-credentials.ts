// The certificates of NBD over TCP: read at the start and again on SIGHUP, with a warning about what will not work for long.
import { X509Certificate } from 'node:crypto'
import { readFile, stat } from 'node:fs/promises'
import { join } from 'node:path'
import type { Clock, Logger } from '@atoll/core'
import type { Engine, TlsConfig } from '@atoll/native'

/** How long before its end a certificate is warned about. */
const warnBeforeMs = 14 * 24 * 60 * 60 * 1000

export interface TlsCredentialsOptions {
  readonly engine: Pick<Engine, 'loadTls'>
  /** The folder with ca-cert.pem, server-cert.pem and server-key.pem. */
  readonly directory: string
  /** Whether clients need a certificate of the authority in ca-cert.pem. */
  readonly verifyClients: boolean
  readonly log: Logger
  readonly clock: Clock
}

/** The credentials in use. */
export interface TlsCredentials {
  current(): TlsConfig
  /** Reads the files again; connections that are there keep what they have. If it fails the old ones stay in use. */
  reload(): Promise<void>
}

/**
 * Reads the credentials.
 * @throws AtollError TLS_CREDENTIALS_INVALID naming the file
 */
export async function loadTlsCredentials(options: TlsCredentialsOptions): Promise<TlsCredentials> {
  const { engine, directory, verifyClients } = options
  let config = await engine.loadTls({ directory, verifyClients })
  await warnOfTrouble(options)
  return {
    current: () => config,
    reload: async () => {
      config = await engine.loadTls({ directory, verifyClients })
      await warnOfTrouble(options)
    },
  }
}

/** What works now, or seems to, and is wrong all the same. */
async function warnOfTrouble({ directory, verifyClients, log, clock }: TlsCredentialsOptions): Promise<void> {
  for (const name of verifyClients ? ['ca-cert.pem', 'server-cert.pem'] : ['server-cert.pem']) {
    const path = join(directory, name)
    let certificate: X509Certificate
    try {
      certificate = new X509Certificate(await readFile(path))
    } catch (error) {
      log.warn({ err: error, path }, 'it cannot be told how long a certificate is valid')
      continue
    }
    const { validFrom, validTo } = certificate
    const endMs = Date.parse(validTo)
    if (endMs <= clock.nowMs()) log.warn({ path, validTo }, 'a certificate has expired: clients will refuse it')
    else if (Date.parse(validFrom) > clock.nowMs()) log.warn({ path, validFrom }, 'a certificate is not valid yet')
    else if (endMs - clock.nowMs() < warnBeforeMs) log.warn({ path, validTo }, 'a certificate expires soon')
  }
  const keyPath = join(directory, 'server-key.pem')
  const { mode } = await stat(keyPath)
  if ((mode & 0o004) !== 0) log.warn({ path: keyPath }, 'every user of this machine can read the private key: chmod 600 it')
}
