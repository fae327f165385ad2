import { describe, expect, it } from 'vitest'
import { addressOf, admit, type ConnectionLimits, type LimitedClient } from './connection-limits.ts'

interface Client extends LimitedClient {
  readonly name: string
}

const limits: ConnectionLimits = { connectionCountMax: 6, connectionCountPerAddressMax: 4, negotiatingCountMax: 3 }

/** `a1+` is a client of address a that serves, `a1` one that negotiates. */
const clients = (...names: string[]): Client[] =>
  names.map((name) => ({ name, address: name.startsWith('-') ? null : name.charAt(0), isNegotiating: !name.endsWith('+') }))

/** What becomes of a new client: `in`, the name of who goes for it, or `out`. */
function decide(address: string | null, ...names: string[]): string {
  const decision = admit(clients(...names), address, limits)
  if (!decision.admitted) return 'out'
  return decision.evicted?.name ?? 'in'
}

describe('a new client', () => {
  it('is taken while there is room', () => {
    expect(decide('a')).toBe('in')
    expect(decide('a', 'a1', 'b1')).toBe('in')
    expect(decide('a', 'a1+', 'b1+', 'c1+', 'd1', 'd2')).toBe('in')
  })

  it('takes the place of the oldest negotiation of the busiest address', () => {
    expect(decide('z', 'a1', 'b1', 'b2')).toBe('b1')
    expect(decide('b', 'a1', 'b1', 'b2')).toBe('b1')
    expect(decide('z', 'a1', 'b1', 'c1')).toBe('a1')
    expect(decide('z', 'a1+', 'a2+', 'b1', 'b2', 'c1')).toBe('b1')
  })

  it('takes the place of a negotiation when the server is full', () => {
    expect(decide('z', 'a1+', 'b1+', 'c1+', 'd1+', 'e1+', 'f1')).toBe('f1')
  })

  it('is turned away when everybody serves', () => {
    expect(decide('z', 'a1+', 'b1+', 'c1+', 'd1+', 'e1+', 'f1+')).toBe('out')
  })

  it('is held to the bound of its address, where only its own negotiations make room', () => {
    expect(decide('a', 'a1+', 'a2+', 'a3+', 'a4+')).toBe('out')
    expect(decide('a', 'b1', 'a1+', 'a2+', 'a3+', 'a4')).toBe('a4')
    expect(decide('b', 'a1+', 'a2+', 'a3+', 'a4+')).toBe('in')
  })

  it('of a unix socket has no address and so no bound of one', () => {
    expect(decide(null, '-1+', '-2+', '-3+', '-4+', '-5+')).toBe('in')
    expect(decide(null, '-1', '-2', '-3')).toBe('-1')
  })
})

it.each([
  ['127.0.0.1:10809', '127.0.0.1'],
  ['[::ffff:10.1.2.3]:5', '10.1.2.3'],
  ['[::1]:5', '0:0:0:0::/64'],
  ['[2001:db8:1:2:3:4:5:6]:5', '2001:db8:1:2::/64'],
  ['[2001:db8:1:2::6]:5', '2001:db8:1:2::/64'],
  ['[2001:db8::6]:5', '2001:db8:0:0::/64'],
  ['[fe80::1%2]:5', 'fe80:0:0:0::/64'],
  ['unix:pid=1,uid=0', null],
  ['', null],
])('the address of %j is %j', (peer, address) => {
  expect(addressOf(peer)).toBe(address)
})
