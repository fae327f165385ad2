/**
 * Which addresses an import may connect to. Whoever may name a source could otherwise make the daemon ask what only the
 * daemon's machine can reach: services on loopback, the neighbours, the metadata service of a cloud.
 *
 * A name is resolved once, every address of it is checked, and the connection goes to the checked address: a name that
 * resolves to another address a moment later changes nothing.
 */
import { lookup as systemLookup } from 'node:dns/promises'
import { BlockList, isIP, isIPv4 } from 'node:net'
import { AtollError } from '@atoll/core'

export interface ResolvedAddress {
  address: string
  family: 4 | 6
}

/** Resolves a name to all of its addresses. */
export type LookupAll = (host: string) => Promise<ResolvedAddress[]>

export const lookupAll: LookupAll = async (host) => (await systemLookup(host, { all: true })) as ResolvedAddress[]

// The registries of special-purpose addresses of IANA (RFC 6890 and its updates), multicast and what is reserved.
const special4 = new BlockList()
for (const range of [
  '0.0.0.0/8',
  '10.0.0.0/8',
  '100.64.0.0/10',
  '127.0.0.0/8',
  '169.254.0.0/16',
  '172.16.0.0/12',
  '192.0.0.0/24',
  '192.0.2.0/24',
  '192.31.196.0/24',
  '192.52.193.0/24',
  '192.88.99.0/24',
  '192.168.0.0/16',
  '192.175.48.0/24',
  '198.18.0.0/15',
  '198.51.100.0/24',
  '203.0.113.0/24',
  '224.0.0.0/4',
  '240.0.0.0/4',
]) {
  const [address = '', prefix] = range.split('/')
  special4.addSubnet(address, Number(prefix), 'ipv4')
}

/** Whether the address (IPv4 or IPv6 as text) is one of the public internet. */
export function isPublicAddress(address: string): boolean {
  if (isIPv4(address)) return !special4.check(address, 'ipv4')
  const groups = groupsOf(address)
  if (groups === null) return false
  const [first = 0, second = 0, third = 0] = groups
  const embedded = (): string => [6, 7].flatMap((index) => [(groups[index] ?? 0) >> 8, (groups[index] ?? 0) & 255]).join('.')
  const startsWith = (...wanted: number[]): boolean => wanted.every((group, index) => groups[index] === group)
  // An IPv4 address in another dress counts as what it is: mapped (::ffff:0:0/96) and NAT64 (64:ff9b::/96).
  if (startsWith(0, 0, 0, 0, 0, 0xffff) || startsWith(0x64, 0xff9b, 0, 0, 0, 0)) return isPublicAddress(embedded())
  // Global unicast is 2000::/3; of it not: 2001::/23 (Teredo, ORCHID, benchmarks), 2001:db8::/32 and 3fff::/20
  // (documentation), 2002::/16 (6to4, which embeds an IPv4 address).
  if (first < 0x2000 || first > 0x3fff) return false
  if (first === 0x2001 && (second < 0x200 || second === 0xdb8)) return false
  if (first === 0x2002) return false
  if (first === 0x3fff && second < 0x1000) return false
  // AS112 (2620:4f:8000::/48).
  return !(first === 0x2620 && second === 0x4f && third === 0x8000)
}

/** The eight groups of an IPv6 address; null if it is none. A zone (`%eth0`) marks a local address, so it is none here. */
function groupsOf(address: string): number[] | null {
  if (isIP(address) !== 6 || address.includes('%')) return null
  const dotted = /^(.*:)(\d+)\.(\d+)\.(\d+)\.(\d+)$/.exec(address)
  const text =
    dotted === null
      ? address
      : `${dotted[1]}${(Number(dotted[2]) * 256 + Number(dotted[3])).toString(16)}:${(Number(dotted[4]) * 256 + Number(dotted[5])).toString(16)}`
  const [head = '', tail] = text.split('::')
  const parse = (part: string): number[] => (part === '' ? [] : part.split(':').map((group) => Number.parseInt(group, 16)))
  const before = parse(head)
  if (tail === undefined) return before
  const after = parse(tail)
  return [...before, ...Array.from({ length: 8 - before.length - after.length }, () => 0), ...after]
}

/**
 * The addresses of a host, each of which may be connected to.
 * @throws AtollError IMAGE_SOURCE_FORBIDDEN naming an address that is not public, unless `allowPrivate`
 */
export async function checkedAddresses(host: string, allowPrivate: boolean, lookup: LookupAll): Promise<ResolvedAddress[]> {
  const bare = host.startsWith('[') ? host.slice(1, -1) : host
  const version = isIP(bare)
  const found = version === 0 ? await lookup(bare) : [{ address: bare, family: version as 4 | 6 }]
  const forbidden = allowPrivate ? undefined : found.find(({ address }) => !isPublicAddress(address))
  if (forbidden === undefined) return found
  throw new AtollError(
    'IMAGE_SOURCE_FORBIDDEN',
    `${host} is ${forbidden.address}, which is no public address: images are fetched from public addresses only, unless the daemon is started with --allow-private-image-sources`,
    { values: { host, address: forbidden.address } },
  )
}
