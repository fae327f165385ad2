import { NbdError } from './nbd-error.ts'
import { defaultPort } from './protocol.ts'

/** Where a server listens. */
export type NbdAddress = { readonly path: string } | { readonly host: string; readonly port: number }

/** What `connect` takes: an NBD URI or an address. */
export type NbdTarget = string | { readonly path: string } | { readonly host?: string; readonly port?: number }

/** An address and the export that the URI names (`''`, the server's default export, when it names none). */
export interface ResolvedTarget {
  readonly address: NbdAddress
  readonly exportName: string
}

/**
 * Understands `nbd://HOST[:PORT]/EXPORT` and `nbd+unix:///EXPORT?socket=PATH`, or an address as an object.
 * Export names and paths are percent-decoded.
 * @throws NbdError NBD_URI_INVALID, or NBD_TLS_UNSUPPORTED for the `nbds` schemes.
 */
export function resolveTarget(target: NbdTarget): ResolvedTarget {
  if (typeof target === 'string') return parseNbdUri(target)
  if ('path' in target) return { address: { path: target.path }, exportName: '' }
  return { address: { host: target.host ?? 'localhost', port: target.port ?? defaultPort }, exportName: '' }
}

/** The parts of an NBD URI. @throws NbdError as `resolveTarget` does. */
export function parseNbdUri(uri: string): ResolvedTarget {
  let url: URL
  try {
    url = new URL(uri)
  } catch (cause) {
    throw new NbdError('NBD_URI_INVALID', `not an NBD URI: ${uri}`, { cause })
  }
  switch (url.protocol) {
    case 'nbd:': {
      if (url.hostname === '') throw new NbdError('NBD_URI_INVALID', `the URI names no host: ${uri}`)
      if (url.searchParams.has('socket')) {
        throw new NbdError('NBD_URI_INVALID', `socket= belongs to nbd+unix://, not to nbd://: ${uri}`)
      }
      const host = url.hostname.startsWith('[') ? url.hostname.slice(1, -1) : decode(url.hostname, uri)
      return { address: { host, port: url.port === '' ? defaultPort : Number(url.port) }, exportName: exportNameOf(url, uri) }
    }
    case 'nbd+unix:': {
      if (url.host !== '')
        throw new NbdError('NBD_URI_INVALID', `nbd+unix:// takes no host (write nbd+unix:///EXPORT?socket=PATH): ${uri}`)
      const path = url.searchParams.get('socket')
      if (!path) throw new NbdError('NBD_URI_INVALID', `the URI names no socket (add ?socket=PATH): ${uri}`)
      return { address: { path }, exportName: exportNameOf(url, uri) }
    }
    case 'nbds:':
    case 'nbds+unix:':
      throw new NbdError('NBD_TLS_UNSUPPORTED', `TLS is not supported by this client: ${uri}`)
    default:
      throw new NbdError('NBD_URI_INVALID', `not an NBD URI (expected nbd:// or nbd+unix://): ${uri}`)
  }
}

/** The URI of an export at an address: what `parseNbdUri` takes apart. */
export function formatNbdUri(address: NbdAddress, exportName: string): string {
  const name = exportName.split('/').map(encodeURIComponent).join('/')
  if ('path' in address) return `nbd+unix:///${name}?socket=${encodeURIComponent(address.path).replaceAll('%2F', '/')}`
  const host = address.host.includes(':') ? `[${address.host}]` : address.host
  return `nbd://${host}:${address.port}/${name}`
}

function exportNameOf(url: URL, uri: string): string {
  return decode(url.pathname.startsWith('/') ? url.pathname.slice(1) : url.pathname, uri)
}

function decode(text: string, uri: string): string {
  try {
    return decodeURIComponent(text)
  } catch (cause) {
    throw new NbdError('NBD_URI_INVALID', `broken percent-encoding in ${uri}`, { cause })
  }
}
