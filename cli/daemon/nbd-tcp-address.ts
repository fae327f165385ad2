// Where NBD over TCP is reached, as clients have to write it.
import { hostname } from 'node:os'
import type { ListenAddress } from '@atoll/core'

/** A server of NBD on TCP. */
export interface NbdTcpServer {
  readonly host: string
  readonly port: number
  readonly tls: boolean
}

/** `nbd://HOST:PORT` or `nbds://HOST:PORT`, with an IPv6 address in brackets. */
export function nbdTcpUrl({ host, port, tls }: NbdTcpServer): string {
  return `${tls ? 'nbds' : 'nbd'}://${host.includes(':') ? `[${host}]` : host}:${port}`
}

/**
 * What clients connect to when the daemon listens on `listen` with this port. The host stays as it was written: a certificate is
 * for a name. One that listens on every address is reached by the machine's name.
 */
export function reachableServer(listen: ListenAddress, port: number, tls: boolean): NbdTcpServer {
  const isAnyAddress = listen.host === '0.0.0.0' || listen.host === '::'
  return { host: isAnyAddress ? hostname() : listen.host, port, tls }
}
