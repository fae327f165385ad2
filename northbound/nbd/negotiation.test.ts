/**
 * The parser alone, against a socket in memory. What a real client sees is in the other tests of this folder.
 */
import { describe, expect, it } from 'vitest'
import { AtollError } from '@atoll/core'
import type { Device, FrozenMap } from '@atoll/native'
import { encodeInfoRequest, encodeMetaContextRequest, encodeOption } from '@atoll/nbd-client'
import type { ExportTable, NbdExport } from './export-table.ts'
import { negotiate } from './negotiation.ts'
import { selectedContextsMax } from './meta-contexts.ts'
import { defaultNegotiationLimits, type NegotiationLimits } from './negotiation-limits.ts'
import { NegotiationEnded, type NegotiationSocket } from './option-channel.ts'
import { encodeText } from './option-text.ts'
import { infoItem, option, optionReply } from './protocol.ts'
import type { Transmission } from './session.ts'

/** Gives out what it was made of and keeps what is written. */
class MemorySocket implements NegotiationSocket {
  readonly written: Buffer[] = []
  largestRead = 0
  #input: Buffer

  constructor(...input: readonly Uint8Array[]) {
    this.#input = Buffer.concat(input)
  }

  get leftBytes(): number {
    return this.#input.length
  }

  async read(lengthBytes: number): Promise<Uint8Array | null> {
    this.largestRead = Math.max(this.largestRead, lengthBytes)
    if (lengthBytes > this.#input.length) return null
    const bytes = this.#input.subarray(0, lengthBytes)
    this.#input = this.#input.subarray(lengthBytes)
    return bytes
  }

  async write(bytes: Uint8Array): Promise<void> {
    this.written.push(Buffer.from(bytes))
  }
}

const device = { sizeBytes: () => 1 << 20, readOnly: () => false } as Device
const mapOf = (name: string): FrozenMap => ({ name }) as unknown as FrozenMap
const disk: NbdExport = { id: 'disk', name: 'a volume', description: 'a disk', device, readOnly: false }

function tableOf(...entries: NbdExport[]): ExportTable & { entered: string[] } {
  const entered: string[] = []
  return {
    entered,
    get: (name) => entries.find(({ id }) => id === name) ?? null,
    list: () => entries,
    enter: (entry) => entered.push(entry.id),
    leave: () => {},
  }
}

interface Outcome {
  transmission: Transmission | null
  endedBecause: string | null
  /** Option, reply type, data as text. */
  replies: [number, number, string][]
  raw: Buffer
  socket: MemorySocket
}

async function negotiateWith(
  options: readonly Uint8Array[],
  settings: {
    flags?: number
    exports?: ExportTable
    listing?: boolean
    draining?: boolean
    limits?: Partial<NegotiationLimits>
  } = {},
): Promise<Outcome> {
  const flags = Buffer.alloc(4)
  flags.writeUInt32BE(settings.flags ?? 3, 0)
  const socket = new MemorySocket(flags, ...options)
  const exports = settings.exports ?? tableOf(disk)
  const context = {
    exports,
    listing: settings.listing ?? true,
    isDraining: () => settings.draining ?? false,
    enter: (entry: NbdExport) => exports.enter(entry, { peer: 'test', drain: async () => {}, close: async () => {} }),
  }
  let transmission: Transmission | null = null
  let endedBecause: string | null = null
  try {
    transmission = await negotiate(socket, context, { ...defaultNegotiationLimits, ...settings.limits })
  } catch (error) {
    if (!(error instanceof NegotiationEnded)) throw error
    endedBecause = error.message
  }
  const raw = Buffer.concat(socket.written).subarray(18)
  const replies: Outcome['replies'] = []
  for (let at = 0; at + 20 <= raw.length && raw.readBigUInt64BE(at) === 0x3e889045565a9n;) {
    const lengthBytes = raw.readUInt32BE(at + 16)
    replies.push([raw.readUInt32BE(at + 8), raw.readUInt32BE(at + 12), raw.toString('latin1', at + 20, at + 20 + lengthBytes)])
    at += 20 + lengthBytes
  }
  return { transmission, endedBecause, replies, raw, socket }
}

const types = (outcome: Outcome): number[] => outcome.replies.map(([, type]) => type)
const structured = encodeOption(option.structuredReply, new Uint8Array())
const extended = encodeOption(option.extendedHeaders, new Uint8Array())
const abort = encodeOption(option.abort, new Uint8Array())
const list = encodeOption(option.list, new Uint8Array())
const go = (name = 'disk', items: number[] = []): Buffer => encodeOption(option.go, encodeInfoRequest(name, items))
const setContexts = (queries: string[], name = 'disk'): Buffer =>
  encodeOption(option.setMetaContext, encodeMetaContextRequest(name, queries))
const listContexts = (queries: string[], name = 'disk'): Buffer =>
  encodeOption(option.listMetaContext, encodeMetaContextRequest(name, queries))

describe('the negotiation', () => {
  it('closes on client flags that it does not know (rule 1)', async () => {
    const outcome = await negotiateWith([list], { flags: 7 })
    expect(outcome.endedBecause).toMatch(/unknown client flags/)
    expect(outcome.raw.length).toBe(0)
  })

  it('refuses an option that it does not know and takes the next one (rule 2)', async () => {
    for (const number of [0, 4, 5, 12, 13, 0xffffffff]) {
      const outcome = await negotiateWith([encodeOption(number, Buffer.alloc(300, 1)), abort])
      expect(types(outcome)).toEqual([optionReply.errorUnsupported, optionReply.ack])
    }
  })

  it('refuses LIST and STRUCTURED_REPLY with data, lists nothing then, and stays in step (rule 3)', async () => {
    for (const number of [option.list, option.structuredReply]) {
      const outcome = await negotiateWith([encodeOption(number, Buffer.from('x')), abort])
      expect(types(outcome)).toEqual([optionReply.errorInvalid, optionReply.ack])
    }
  })

  it('acknowledges ABORT, with data too, and closes (rule 4)', async () => {
    for (const data of ['', 'goodbye']) {
      const outcome = await negotiateWith([encodeOption(option.abort, Buffer.from(data)), list])
      expect(outcome.replies).toEqual([[option.abort, optionReply.ack, '']])
      expect(outcome.socket.leftBytes).toBe(list.length)
    }
  })

  it('refuses GO and INFO whose lengths do not fit the data, and stays in step (rule 5)', async () => {
    const good = encodeInfoRequest('disk', [0, 1])
    const nameTooLong = Buffer.from(good)
    nameTooLong.writeUInt32BE(good.length - 5, 0)
    const nameHuge = Buffer.from(good)
    nameHuge.writeUInt32BE(0xffffffff, 0)
    const countTooLarge = Buffer.from(good)
    countTooLarge.writeUInt16BE(3, 8)
    const countTooSmall = Buffer.from(good)
    countTooSmall.writeUInt16BE(1, 8)
    const bad = [
      Buffer.alloc(0),
      Buffer.alloc(5),
      nameTooLong,
      nameHuge,
      countTooLarge,
      countTooSmall,
      Buffer.concat([good, Buffer.from('x')]),
    ]
    for (const data of bad) {
      for (const number of [option.info, option.go]) {
        const outcome = await negotiateWith([encodeOption(number, data), abort])
        expect(types(outcome)).toEqual([optionReply.errorInvalid, optionReply.ack])
      }
    }
  })

  it('says the same in INFO and in GO (rule 6)', async () => {
    const items = [infoItem.export, infoItem.name, infoItem.description, infoItem.blockSize, 77]
    const outcome = await negotiateWith([
      structured,
      encodeOption(option.info, encodeInfoRequest('disk', items)),
      go('disk', items),
    ])
    const said = (number: number): string[] =>
      outcome.replies.filter(([asked]) => asked === number).map(([, type, data]) => `${type} ${data}`)
    expect(said(option.info)).toEqual(said(option.go))
    expect(said(option.go)).toHaveLength(5)
    expect(outcome.transmission?.entry).toBe(disk)
  })

  it('sets HAS_FLAGS always and DF only after structured replies were negotiated (rule 7)', async () => {
    const flagsOf = (outcome: Outcome): number => Buffer.from(outcome.replies.at(-2)![2], 'latin1').readUInt16BE(10)
    const simple = flagsOf(await negotiateWith([go()]))
    const withStructured = flagsOf(await negotiateWith([structured, go()]))
    expect(simple & 1).toBe(1)
    expect(simple & (1 << 7)).toBe(0)
    expect(withStructured).toBe(simple | (1 << 7))
    expect(flagsOf(await negotiateWith([extended, go()]))).toBe(withStructured)
  })

  it('advertises the filter of statuses where headers are extended and there are contexts for this export (rule 29)', async () => {
    const filter = 1 << 12
    const flagsOf = (outcome: Outcome): number => Buffer.from(outcome.replies.at(-2)![2], 'latin1').readUInt16BE(10)
    const exports = tableOf(disk, { ...disk, id: 'other' })
    expect(flagsOf(await negotiateWith([extended, setContexts(['base:allocation']), go()])) & filter).toBe(filter)
    expect(flagsOf(await negotiateWith([structured, setContexts(['base:allocation']), extended, go()])) & filter).toBe(filter)
    expect(flagsOf(await negotiateWith([structured, setContexts(['base:allocation']), go()])) & filter).toBe(0)
    expect(flagsOf(await negotiateWith([extended, setContexts(['x-y:z']), go()])) & filter).toBe(0)
    expect(flagsOf(await negotiateWith([extended, setContexts(['base:allocation'], 'other'), go()], { exports })) & filter).toBe(
      0,
    )
  })

  it('extended headers take the place of structured replies, and leave only GO as a way in (rule 29)', async () => {
    const [exportName, withData] = [option.exportName, option.extendedHeaders].map((number) =>
      encodeOption(number, Buffer.from('disk')),
    )
    const outcome = await negotiateWith([withData!, extended, structured, extended, go()])
    expect(types(outcome).slice(0, 4)).toEqual([
      optionReply.errorInvalid,
      optionReply.ack,
      optionReply.errorExtendedHeadersRequired,
      optionReply.ack,
    ])
    expect(outcome.transmission?.replies).toBe('extended')
    expect((await negotiateWith([structured, extended, go()])).transmission?.replies).toBe('extended')
    expect((await negotiateWith([structured, go()])).transmission?.replies).toBe('structured')
    expect((await negotiateWith([go()])).transmission?.replies).toBe('simple')
    expect(await negotiateWith([extended, exportName!])).toMatchObject({
      transmission: null,
      endedBecause: 'EXPORT_NAME after extended headers were negotiated',
    })
  })

  it('pads the answer to EXPORT_NAME unless NO_ZEROES was agreed on, and never the one to GO (rule 8)', async () => {
    const exportName = encodeOption(option.exportName, Buffer.from('disk'))
    expect((await negotiateWith([exportName], { flags: 1 })).raw.length).toBe(134)
    expect((await negotiateWith([exportName], { flags: 3 })).raw.length).toBe(10)
    for (const flags of [1, 3]) expect((await negotiateWith([go()], { flags })).raw.length).toBe(20 + 12 + 20)
  })

  it('says sensible block sizes when asked and demands none (rules 9 and 10)', async () => {
    const outcome = await negotiateWith([go('disk', [infoItem.blockSize, 999])])
    const blockSize = Buffer.from(outcome.replies[1]![2], 'latin1')
    const [minimum, preferred, maximum] = [2, 6, 10].map((at) => blockSize.readUInt32BE(at))
    expect([minimum, preferred, maximum]).toEqual([1, 4096, 32 << 20])
    expect(types(await negotiateWith([go('disk', [])]))).toEqual([optionReply.info, optionReply.ack])
  })

  it('takes names that are UTF-8 without NUL of at most 4096 bytes, and no others (rule 11)', async () => {
    const named = (name: Uint8Array): Buffer => {
      const length = Buffer.alloc(4)
      length.writeUInt32BE(name.length, 0)
      return encodeOption(option.info, Buffer.concat([length, name, Buffer.alloc(2)]))
    }
    for (const name of [
      Buffer.from('disk\0'),
      Buffer.from([0xff]),
      Buffer.from([0xc3]),
      Buffer.from([0xed, 0xa0, 0x80]),
      Buffer.alloc(4097, 'a'),
    ]) {
      expect(types(await negotiateWith([named(name), abort]))).toEqual([optionReply.errorInvalid, optionReply.ack])
      const byName = await negotiateWith([encodeOption(option.exportName, name)])
      expect(byName).toMatchObject({ transmission: null, raw: Buffer.alloc(0) })
    }
    const longest = 'ä'.repeat(2048)
    expect(
      types(await negotiateWith([named(Buffer.from(longest)), abort], { exports: tableOf({ ...disk, id: longest }) })),
    ).toEqual([optionReply.info, optionReply.ack, optionReply.ack])
  })

  it('answers an unknown export with ERR_UNKNOWN, one that is being opened with ERR_SHUTDOWN, and closes after EXPORT_NAME', async () => {
    expect(types(await negotiateWith([go('other'), abort]))).toEqual([optionReply.errorUnknown, optionReply.ack])
    const exports: ExportTable = { ...tableOf(), isSuspended: (name) => name === 'disk' }
    expect(types(await negotiateWith([go('disk'), go('other'), abort], { exports }))).toEqual([
      optionReply.errorShutdown,
      optionReply.errorUnknown,
      optionReply.ack,
    ])
    expect((await negotiateWith([encodeOption(option.exportName, Buffer.from('other'))])).raw.length).toBe(0)
  })

  it('tells a client that the export has gone, or has clients enough, and goes on', async () => {
    for (const [code, type] of [
      ['EXPORT_GONE', optionReply.errorShutdown],
      ['JOB_QUEUE_FULL', optionReply.errorPolicy],
    ] as const) {
      const exports: ExportTable = {
        ...tableOf(disk),
        enter: () => {
          throw new AtollError(code, 'not now')
        },
      }
      const outcome = await negotiateWith([go(), abort], { exports })
      expect(types(outcome)).toEqual([type, optionReply.ack])
      expect(outcome.replies[0]![2]).toBe('not now')
    }
  })

  it('lists ids with descriptions, or nothing where that is the policy', async () => {
    const outcome = await negotiateWith([list, abort])
    expect(outcome.replies[0]).toEqual([option.list, optionReply.server, '\0\0\0\x04diska disk'])
    expect(types(outcome)).toEqual([optionReply.server, optionReply.ack, optionReply.ack])
    expect(types(await negotiateWith([list, abort], { listing: false }))).toEqual([optionReply.errorPolicy, optionReply.ack])
  })

  it('does not advertise changes for what is read-only', async () => {
    for (const entry of [
      { ...disk, readOnly: true },
      { ...disk, device: { ...device, readOnly: () => true } as Device },
    ]) {
      const outcome = await negotiateWith([go()], { exports: tableOf(entry) })
      expect(Buffer.from(outcome.replies[0]![2], 'latin1').readUInt16BE(10)).toBe(1 | 2 | 4 | 8 | 256 | 1024)
      expect(outcome.transmission?.readOnly).toBe(true)
    }
  })
})

describe('metadata contexts (rule 13)', () => {
  const name = 'base:allocation'
  const contexts = (outcome: Outcome, number: number): string[] =>
    outcome.replies.filter(([asked, type]) => asked === number && type === optionReply.metaContext).map(([, , data]) => data)

  const depth = 'qemu:allocation-depth'
  const bitmap = (of: string): string => `qemu:dirty-bitmap:${of}`
  const withStates: NbdExport = {
    ...disk,
    changes: {
      list: async () => ['monday', 'tuesday', 'x'.repeat(4090)],
      open: async (of) => (['monday', 'tuesday'].includes(of) || of.startsWith('many-') ? mapOf(of) : null),
    },
  }
  const exports = tableOf(withStates)

  it('are listed for no query, for a namespace and for a name, with id 0', async () => {
    const all = [name, depth, bitmap('monday'), bitmap('tuesday')]
    for (const [queries, expected] of [
      [[], all],
      [['base:'], [name]],
      [[name], [name]],
      [['x-other:', name, name], [name]],
      [['qemu:'], all.slice(1)],
      [['qemu:dirty-bitmap:'], all.slice(2)],
      [[depth], [depth]],
      [
        [bitmap('tuesday'), 'base:'],
        [name, bitmap('tuesday')],
      ],
    ] as const) {
      const outcome = await negotiateWith([structured, listContexts([...queries]), abort], { exports })
      expect(contexts(outcome, option.listMetaContext)).toEqual(expected.map((of) => `\0\0\0\0${of}`))
    }
    expect(contexts(await negotiateWith([extended, listContexts([]), abort]), option.listMetaContext)).toHaveLength(2)
    for (const query of ['base:other', 'x-other:', 'base', '', 'qemu', 'qemu:other', 'qemu:dirty-bitmap', bitmap('sunday')]) {
      expect(types(await negotiateWith([structured, listContexts([query]), abort], { exports }))).toEqual([
        optionReply.ack,
        optionReply.ack,
        optionReply.ack,
      ])
    }
  })

  it('are selected by full name only, each once, with ids of their own', async () => {
    const selected = await negotiateWith([structured, setContexts([name, 'x-other:leaf', name]), go()])
    expect(contexts(selected, option.setMetaContext)).toEqual([`\0\0\0\x01${name}`])
    expect(selected.transmission?.contexts).toEqual([{ id: 1, kind: 'allocation' }])
    const queries = [bitmap('tuesday'), depth, bitmap('sunday'), bitmap('tuesday'), name, bitmap('monday'), depth]
    for (const form of [structured, extended]) {
      const several = await negotiateWith([form, setContexts(queries), go()], { exports })
      expect(contexts(several, option.setMetaContext)).toEqual([
        `\0\0\0\x01${bitmap('tuesday')}`,
        `\0\0\0\x02${depth}`,
        `\0\0\0\x03${name}`,
        `\0\0\0\x04${bitmap('monday')}`,
      ])
      expect(several.transmission?.contexts).toEqual([
        { id: 1, kind: 'changed-since', base: mapOf('tuesday') },
        { id: 2, kind: 'depth' },
        { id: 3, kind: 'allocation' },
        { id: 4, kind: 'changed-since', base: mapOf('monday') },
      ])
    }
    for (const query of ['base:', 'base:other', 'no colon', 'qemu:', 'qemu:dirty-bitmap:', bitmap('sunday')]) {
      const outcome = await negotiateWith([structured, setContexts([query]), go()], { exports })
      expect(contexts(outcome, option.setMetaContext)).toEqual([])
      expect(outcome.transmission?.contexts).toEqual([])
    }
    expect((await negotiateWith([structured, setContexts([]), go()])).transmission?.contexts).toEqual([])
  })

  it('are refused when they are too many, or cannot be read, and then none is selected', async () => {
    const many = Array.from({ length: selectedContextsMax + 1 }, (_, index) => bitmap(`many-${index}`))
    const outcome = await negotiateWith([structured, setContexts([name]), setContexts(many), go()], { exports })
    expect(types(outcome)).toContain(optionReply.errorTooBig)
    expect(outcome.transmission?.contexts).toEqual([])
    const most = await negotiateWith([structured, setContexts(many.slice(1)), go()], { exports })
    expect(most.transmission?.contexts).toHaveLength(selectedContextsMax)
    const broken: NbdExport = {
      ...disk,
      changes: { list: () => Promise.reject(new Error('gone')), open: () => Promise.reject(new Error('gone')) },
    }
    const failed = await negotiateWith(
      [structured, setContexts([name]), setContexts([bitmap('monday')]), listContexts([]), go()],
      {
        exports: tableOf(broken),
      },
    )
    expect(types(failed).filter((type) => type === optionReply.errorPlatform)).toHaveLength(2)
    expect(failed.transmission?.contexts).toEqual([])
  })

  it('need chunks to be told in', async () => {
    expect(types(await negotiateWith([setContexts([name]), listContexts([name]), abort]))).toEqual([
      optionReply.errorInvalid,
      optionReply.errorInvalid,
      optionReply.ack,
    ])
  })

  it('refuse a query or a count longer than the data, and stay in step', async () => {
    const good = encodeMetaContextRequest('disk', [name])
    const queryTooLong = Buffer.from(good)
    queryTooLong.writeUInt32BE(name.length + 1, 12)
    const countTooLarge = Buffer.from(good)
    countTooLarge.writeUInt32BE(0xffffffff, 8)
    const nameTooLong = Buffer.from(good)
    nameTooLong.writeUInt32BE(1000, 0)
    for (const data of [
      queryTooLong,
      countTooLarge,
      nameTooLong,
      Buffer.concat([good, Buffer.from('x')]),
      Buffer.alloc(0),
      good.subarray(0, 10),
    ]) {
      for (const number of [option.setMetaContext, option.listMetaContext]) {
        const outcome = await negotiateWith([structured, encodeOption(number, data), abort])
        expect(types(outcome)).toEqual([optionReply.ack, optionReply.errorInvalid, optionReply.ack])
      }
    }
  })

  it('are dropped by a failed selection, by an empty one, and by GO for another export', async () => {
    const broken = encodeOption(option.setMetaContext, Buffer.alloc(3))
    const others = tableOf(disk, { ...disk, id: 'other' })
    for (const after of [broken, setContexts([name], 'missing'), setContexts([])]) {
      const outcome = await negotiateWith([structured, setContexts([name]), after, go()], { exports: others })
      expect(outcome.transmission?.contexts).toEqual([])
    }
    expect(
      (await negotiateWith([structured, setContexts([name]), go('other')], { exports: others })).transmission?.contexts,
    ).toEqual([])
    expect(
      (await negotiateWith([structured, setContexts([name]), listContexts([]), go()], { exports: others })).transmission
        ?.contexts,
    ).toHaveLength(1)
  })
})

describe('the bounds of a negotiation', () => {
  it('long data is consumed and refused, without a large read', async () => {
    const outcome = await negotiateWith([
      encodeOption(option.list, Buffer.alloc(65537)),
      encodeOption(77, Buffer.alloc(1 << 20)),
      abort,
    ])
    expect(types(outcome)).toEqual([optionReply.errorTooBig, optionReply.errorTooBig, optionReply.ack])
    expect(outcome.socket.largestRead).toBe(65536)
  })

  it('beyond the bound of what is skipped, and for EXPORT_NAME, the connection is closed unread', async () => {
    for (const header of [
      encodeOption(option.list, new Uint8Array(), (1 << 20) + 1),
      encodeOption(77, new Uint8Array(), 0xffffffff),
      encodeOption(option.exportName, new Uint8Array(), 65537),
    ]) {
      const outcome = await negotiateWith([header, Buffer.alloc(70_000)])
      expect(outcome.endedBecause).toMatch(/bytes/)
      expect(outcome.socket.leftBytes).toBe(70_000)
      expect(outcome.raw.length).toBe(0)
    }
  })

  it('too many options end it', async () => {
    const outcome = await negotiateWith(
      Array.from({ length: 20 }, () => list),
      { limits: { optionCountMax: 10 } },
    )
    expect(outcome.endedBecause).toMatch(/more than 10 options/)
    expect(types(outcome)).toHaveLength(20)
  })

  it('an option without its magic ends it', async () => {
    expect((await negotiateWith([Buffer.alloc(16), list])).endedBecause).toMatch(/out of step/)
  })

  it('an end in the middle of anything ends it', async () => {
    const whole = Buffer.concat([structured, setContexts(['base:allocation']), go()])
    for (let length = 0; length < whole.length; length += 1) {
      const outcome = await negotiateWith([whole.subarray(0, length)])
      expect(outcome.endedBecause).toMatch(/closed/)
    }
  })

  it('a stopping server answers ERR_SHUTDOWN to all but ABORT, and closes after EXPORT_NAME', async () => {
    const options = [list, structured, go(), setContexts([]), encodeOption(99, new Uint8Array())]
    const outcome = await negotiateWith([...options, abort], { draining: true })
    expect(types(outcome)).toEqual([...options.map(() => optionReply.errorShutdown), optionReply.ack])
    expect(
      (await negotiateWith([encodeOption(option.exportName, Buffer.from('disk'))], { draining: true })).endedBecause,
    ).toMatch(/shutting down/)
  })
})

describe('texts for clients', () => {
  it('are cut to 4096 bytes between characters', () => {
    for (const text of ['', 'plain', 'ä'.repeat(2048), `a${'ä'.repeat(2048)}`, '😀'.repeat(1025), `abc${'😀'.repeat(2000)}`]) {
      const bytes = encodeText(text)
      expect(bytes.length).toBeLessThanOrEqual(4096)
      expect(bytes.length).toBeGreaterThanOrEqual(Math.min(Buffer.byteLength(text), 4093))
      expect(text.startsWith(new TextDecoder('utf-8', { fatal: true }).decode(bytes))).toBe(true)
    }
  })
})
