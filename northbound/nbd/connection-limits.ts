/**
 * How many clients a server takes, and who has to go when it has enough.
 *
 * A client that negotiates has shown nothing yet: there are few such places, and a new client gets one by ending the oldest
 * negotiation of the address that has the most. So a flood of connections that say nothing ends itself, while a client that gets
 * on with its negotiation is through in a moment. A client that serves an export is never ended for another.
 */
export interface ConnectionLimits {
  /** Connections at a time. */
  readonly connectionCountMax: number
  /** Connections from one network address at a time; a unix socket has no addresses. */
  readonly connectionCountPerAddressMax: number
  /** Connections at a time that still negotiate. */
  readonly negotiatingCountMax: number
}

export const defaultConnectionLimits: ConnectionLimits = {
  connectionCountMax: 512,
  connectionCountPerAddressMax: 256,
  negotiatingCountMax: 128,
}

/** A client as far as limits have to do with it. */
export interface LimitedClient {
  readonly address: string | null
  readonly isNegotiating: boolean
}

/** What becomes of a new client: it is taken, in the place of `evicted` if that is not null, or turned away. */
export type Admission<Client> =
  | { readonly admitted: true; readonly evicted: Client | null }
  | { readonly admitted: false; readonly reason: string }

/** Decides about a new client from `address`. `clients` are those taken before, the oldest first. */
export function admit<Client extends LimitedClient>(
  clients: Iterable<Client>,
  address: string | null,
  limits: ConnectionLimits,
): Admission<Client> {
  let count = 0
  let ofAddressCount = 0
  const negotiating: Client[] = []
  for (const client of clients) {
    count += 1
    if (address !== null && client.address === address) ofAddressCount += 1
    if (client.isNegotiating) negotiating.push(client)
  }
  if (ofAddressCount >= limits.connectionCountPerAddressMax) {
    const evicted = negotiating.find((client) => client.address === address)
    if (evicted !== undefined) return { admitted: true, evicted }
    return { admitted: false, reason: `${limits.connectionCountPerAddressMax} connections from this address` }
  }
  if (count < limits.connectionCountMax && negotiating.length < limits.negotiatingCountMax) {
    return { admitted: true, evicted: null }
  }
  const evicted = oldestOfBusiest(negotiating)
  if (evicted !== null) return { admitted: true, evicted }
  return { admitted: false, reason: `${limits.connectionCountMax} connections` }
}

/** The oldest client of the address that has the most. */
function oldestOfBusiest<Client extends LimitedClient>(clients: readonly Client[]): Client | null {
  const counts = new Map<string | null, number>()
  for (const { address } of clients) counts.set(address, (counts.get(address) ?? 0) + 1)
  const most = Math.max(...counts.values())
  return clients.find(({ address }) => counts.get(address) === most) ?? null
}

/**
 * What counts as one address in `HOST:PORT` or `[HOST]:PORT`: an IPv4 address, also where it is mapped into IPv6; of an IPv6
 * address the network of 64 bits, which one machine may have all of. Null: no network address.
 */
export function addressOf(peer: string): string | null {
  const v6 = /^\[([0-9a-fA-F:.]+)(?:%[^\]]*)?\]:\d+$/.exec(peer)?.[1]
  if (v6 === undefined) return /^([\d.]+):\d+$/.exec(peer)?.[1] ?? null
  const mapped = /^::ffff:([\d.]+)$/i.exec(v6)?.[1]
  if (mapped !== undefined) return mapped
  const [head = '', tail] = v6.split('::')
  const groups = head === '' ? [] : head.split(':')
  // What "::" stands for is zeros, as many groups as are missing.
  const rest = tail === undefined || tail === '' ? [] : tail.split(':')
  const all =
    tail === undefined ? groups : [...groups, ...Array<string>(Math.max(0, 8 - groups.length - rest.length)).fill('0'), ...rest]
  return `${all.slice(0, 4).join(':')}::/64`
}
