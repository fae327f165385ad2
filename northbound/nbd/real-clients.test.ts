/** Clients from packages: libnbd's tools and bindings, QEMU's tools. */
import { execFile } from 'node:child_process'
import { randomFillSync } from 'node:crypto'
import { open, readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { afterEach, beforeEach, expect, it } from 'vitest'
import { connect } from '@atoll/nbd-client'
import { describeWithTools, nbdcopyTool, nbdinfoTool, pythonLibnbdTool, qemuImgTool, qemuIoTool } from '@atoll/nbd-client/testing'
import { KiB, MiB, NbdFixture } from './testing/nbd-fixture.ts'

const sizeBytes = 64 * MiB

/** Output of a program that must succeed; its own words are in the error if it does not. */
async function run(command: string, ...parameters: string[]): Promise<string> {
  const { stdout } = await promisify(execFile)(command, parameters, { maxBuffer: 16 * MiB, timeout: 300_000 })
  return stdout
}

let fixture: NbdFixture
beforeEach(async () => {
  fixture = await NbdFixture.start({ sizeBytes })
})
afterEach(async () => {
  await fixture.close()
})

const file = (name: string): string => join(fixture.directory, name)

/** A file with data, zeros and holes. */
async function makeSource(path: string): Promise<Buffer> {
  const content = Buffer.alloc(sizeBytes)
  for (const [offsetBytes, lengthBytes] of [
    [0, 5 * MiB],
    [10 * MiB + 512, 3 * KiB],
    [20 * MiB, 64 * KiB],
    [sizeBytes - 8 * KiB, 8 * KiB],
  ] as const) {
    randomFillSync(content, offsetBytes, lengthBytes)
  }
  const target = await open(path, 'w')
  await target.truncate(sizeBytes)
  for (let at = 0; at < sizeBytes; at += MiB) {
    const piece = content.subarray(at, at + MiB)
    if (!piece.every((byte) => byte === 0)) await target.write(piece, 0, MiB, at)
  }
  await target.close()
  return content
}

describeWithTools('nbdinfo', [nbdinfoTool], () => {
  it('shows size, flags, block sizes and contexts', async () => {
    const shown = JSON.parse(await run('nbdinfo', '--json', fixture.uri()))
    expect(shown).toMatchObject({
      protocol: 'newstyle-fixed',
      structured: true,
      exports: [
        {
          'export-name': 'disk',
          description: 'a disk',
          'export-size': sizeBytes,
          contexts: ['base:allocation', 'qemu:allocation-depth'],
          is_read_only: false,
          can_df: true,
          can_flush: true,
          can_fua: true,
          can_multi_conn: true,
          can_trim: true,
          can_zero: true,
          can_cache: true,
          can_fast_zero: true,
          block_size_minimum: 1,
          block_size_preferred: 4096,
          block_size_maximum: 32 * MiB,
        },
      ],
    })
  })

  it('lists the exports', async () => {
    const { device } = await fixture.openDevice({ sizeBytes: MiB })
    fixture.exports.add('second', device, { readOnly: true })
    const shown = JSON.parse(await run('nbdinfo', '--json', '--list', fixture.uri('')))
    expect(
      shown.exports.map((entry: Record<string, unknown>) => [entry['export-name'], entry['export-size'], entry['is_read_only']]),
    ).toEqual([
      ['disk', sizeBytes, false],
      ['second', MiB, true],
    ])
  })

  it('maps data and holes', async () => {
    await using connection = await connect(fixture.uri())
    await connection.write(MiB, randomFillSync(Buffer.alloc(MiB)))
    const map = JSON.parse(await run('nbdinfo', '--json', '--map', fixture.uri()))
    expect(map.map((entry: Record<string, unknown>) => [entry['offset'], entry['length'], entry['type']])).toEqual([
      [0, MiB, 3],
      [MiB, MiB, 0],
      [2 * MiB, sizeBytes - 2 * MiB, 3],
    ])
  })
})

describeWithTools('nbdcopy', [nbdcopyTool], () => {
  it('copies in and out over several connections, and holes stay holes', async () => {
    const content = await makeSource(file('source.raw'))
    await run('nbdcopy', '--connections=4', '--requests=64', '--flush', file('source.raw'), fixture.uri())
    await run('nbdcopy', '--connections=4', fixture.uri(), file('target.raw'))
    expect(content.equals(await readFile(file('target.raw')))).toBe(true)
    await run('nbdcopy', '--synchronous', fixture.uri(), file('synchronous.raw'))
    expect(content.equals(await readFile(file('synchronous.raw')))).toBe(true)
    await using connection = await connect(fixture.uri(), { metaContexts: ['base:allocation'] })
    const extents = (await connection.blockStatus(30 * MiB, MiB, { reqOne: true })).get('base:allocation')!
    expect(extents).toEqual([{ offsetBytes: 30 * MiB, lengthBytes: MiB, flags: 3 }])
  })

  it('copies from one export to another', async () => {
    const content = await makeSource(file('source.raw'))
    const { device } = await fixture.openDevice({ sizeBytes })
    fixture.exports.add('second', device)
    await run('nbdcopy', '--flush', file('source.raw'), fixture.uri())
    await run('nbdcopy', '--destination-is-zero', fixture.uri(), fixture.uri('second'))
    await run('nbdcopy', fixture.uri('second'), file('target.raw'))
    expect(content.equals(await readFile(file('target.raw')))).toBe(true)
  })
})

describeWithTools('qemu-img and qemu-io', [qemuImgTool, qemuIoTool], () => {
  it('convert, compare and map', async () => {
    const content = await makeSource(file('source.raw'))
    await run('qemu-img', 'convert', '-n', '-f', 'raw', '-O', 'raw', file('source.raw'), fixture.uri())
    await run('qemu-img', 'compare', '-f', 'raw', '-F', 'raw', file('source.raw'), fixture.uri())
    await run('qemu-img', 'convert', '-f', 'raw', '-O', 'qcow2', fixture.uri(), file('copy.qcow2'))
    await run('qemu-img', 'convert', '-f', 'qcow2', '-O', 'raw', file('copy.qcow2'), file('copy.raw'))
    expect(content.equals(await readFile(file('copy.raw')))).toBe(true)
    const map = JSON.parse(await run('qemu-img', 'map', '--output=json', '-f', 'raw', fixture.uri()))
    expect(map.at(-1)).toMatchObject({ data: true })
    expect(map.some((entry: Record<string, unknown>) => entry['zero'] === true && entry['data'] === false)).toBe(true)
    expect(JSON.parse(await run('qemu-img', 'info', '--output=json', '-f', 'raw', fixture.uri()))).toMatchObject({
      'virtual-size': sizeBytes,
    })
  })

  it('write, zero, discard, flush and read back patterns of any alignment', async () => {
    const output = await run(
      'qemu-io',
      '-f',
      'raw',
      '--discard=unmap',
      '--cache=none',
      '-c',
      'write -P 0x11 0 1M',
      '-c',
      'write -P 0x22 4097 513',
      '-c',
      'write -z 64k 64k',
      '-c',
      'write -z -u 128k 64k',
      '-c',
      'discard 256k 64k',
      '-c',
      'write -f -P 0x33 1M 2M',
      '-c',
      'flush',
      '-c',
      'read -P 0x11 0 4097',
      '-c',
      'read -P 0x22 4097 513',
      '-c',
      'read -P 0 64k 128k',
      '-c',
      'read -P 0x11 192k 64k',
      '-c',
      'read -P 0x33 1M 2M',
      '-c',
      'read -P 0 3M 1M',
      fixture.uri(),
    )
    expect(output).not.toMatch(/fail|error|differ/i)
    expect(output.match(/read \d+\/\d+ bytes/g)).toHaveLength(6)
  })

  it('do not write to a read-only export', async () => {
    const { device } = await fixture.openDevice({ sizeBytes: MiB })
    fixture.exports.add('frozen', device, { readOnly: true })
    await expect(run('qemu-io', '-f', 'raw', '-c', 'write 0 4k', fixture.uri('frozen'))).rejects.toThrowError(/qemu-io/)
    expect(await run('qemu-io', '-r', '-f', 'raw', '-c', 'read -P 0 0 4k', fixture.uri('frozen'))).toMatch(/read 4096/)
  })
})

/** Runs a script with libnbd; `uri` is the export's. A failed assertion fails the process. */
async function runLibnbd(script: string): Promise<string> {
  const path = file('script.py')
  await writeFile(path, `import nbd, os, sys\nuri = sys.argv[1]\n${script}`)
  return run('/usr/bin/python3', path, fixture.uri())
}

describeWithTools('libnbd', [pythonLibnbdTool], () => {
  it('keeps 256 requests in flight on each of 8 connections', async () => {
    const output = await runLibnbd(`
handles = []
for _ in range(8):
    h = nbd.NBD()
    h.connect_uri(uri)
    assert h.can_multi_conn()
    handles.append(h)
done = 0
def finished(error):
    global done
    assert error.value == 0
    done += 1
    return 1
block = 4096
buffers = []
for index in range(256):
    for number, h in enumerate(handles):
        buffer = nbd.Buffer.from_bytearray(bytearray([(index * 8 + number) % 251]) * block)
        buffers.append(buffer)
        h.aio_pwrite(buffer, (index * 8 + number) * block, completion=finished)
for h in handles:
    while h.aio_in_flight() > 0:
        h.poll(-1)
assert done == 2048, done
handles[3].flush()
for index in range(2048):
    assert handles[index % 8].pread(block, index * block) == bytes([index % 251]) * block, index
for h in handles:
    h.shutdown()
print('ok')
`)
    expect(output).toBe('ok\n')
  })

  it('takes structured reads apart, and reads the status with them', async () => {
    const output = await runLibnbd(`
h = nbd.NBD()
h.add_meta_context('base:allocation')
h.connect_uri(uri)
assert h.get_structured_replies_negotiated()
h.pwrite(b'x' * 65536, 1 << 20)
pieces = []
def chunk(data, offset, status, error):
    pieces.append((offset, len(data), status))
    return 0
data = h.pread_structured(2 << 20, 0, chunk)
assert bytes(data) == bytes(1 << 20) + b'x' * 65536 + bytes((1 << 20) - 65536)
assert (1 << 20, 65536, nbd.READ_DATA) in pieces, pieces
assert sum(1 for piece in pieces if piece[2] == nbd.READ_HOLE) == 2, pieces
pieces = []
h.pread_structured(2 << 20, 0, chunk, nbd.CMD_FLAG_DF)
assert [piece[:2] for piece in pieces] == [(0, 2 << 20)], pieces
found = []
def extent(context, offset, entries, error):
    found.append((context, offset, list(entries)))
    return 0
h.block_status(4 << 20, 0, extent)
assert found[0][:2] == ('base:allocation', 0) and found[0][2][:4] == [1 << 20, 3, 65536, 0], found
h.shutdown()
print('ok')
`)
    expect(output).toBe('ok\n')
  })

  it('asks in option mode, and goes on after refusals', async () => {
    const output = await runLibnbd(`
h = nbd.NBD()
h.set_opt_mode(True)
h.connect_uri(uri)
names = []
h.opt_list(lambda name, description: names.append((name, description)) or 0)
assert names == [('disk', 'a disk')], names
h.set_export_name('missing')
for refused in (h.opt_info, h.opt_go):
    try:
        refused()
        raise AssertionError('a missing export was found')
    except nbd.Error:
        pass
h.set_export_name('disk')
contexts = []
h.add_meta_context('base:')
h.opt_list_meta_context(lambda name: contexts.append(name) or 0)
assert contexts == ['base:allocation'], contexts
h.opt_info()
size = h.get_size()
h.clear_meta_contexts()
h.add_meta_context('base:allocation')
h.opt_go()
assert h.get_size() == size and h.can_meta_context('base:allocation')
h.shutdown()
h = nbd.NBD()
h.set_opt_mode(True)
h.connect_uri(uri)
h.opt_abort()
print('ok')
`)
    expect(output).toBe('ok\n')
  })

  it('gets the errors of requests that its own checks would have held back', async () => {
    const output = await runLibnbd(`
import errno
h = nbd.NBD()
h.connect_uri(uri)
h.set_strict_mode(0)
def fails(number, call, *arguments):
    try:
        call(*arguments)
    except nbd.Error as error:
        assert error.errnum == number, (error.errnum, call, arguments)
        return
    raise AssertionError('%r did not fail' % (call,))
size = h.get_size()
fails(errno.EINVAL, h.pread, 512, size)
fails(errno.ENOSPC, h.pwrite, b'x' * 512, size)
fails(errno.ENOSPC, h.zero, 512, size)
fails(errno.EINVAL, h.trim, 512, size)
fails(errno.EINVAL, h.cache, 512, size)
fails(errno.EINVAL, h.cache, 512, 0, nbd.CMD_FLAG_NO_HOLE)
h.cache(512, 0)
fails(errno.ENOTSUP, h.zero, 512, 0, nbd.CMD_FLAG_FAST_ZERO)
fails(errno.ENOTSUP, h.zero, 4096, 0, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE)
h.zero(4096, 0, nbd.CMD_FLAG_FAST_ZERO)
fails(errno.EINVAL, h.pread, 512, 0, nbd.CMD_FLAG_NO_HOLE)
h.pwrite(b'still here', 0, nbd.CMD_FLAG_FUA)
assert h.pread(10, 0) == b'still here'
h.shutdown()
print('ok')
`)
    expect(output).toBe('ok\n')
  })

  it('works with simple replies and through EXPORT_NAME', async () => {
    const output = await runLibnbd(`
for flags in (0, nbd.HANDSHAKE_FLAG_NO_ZEROES, nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE, nbd.HANDSHAKE_FLAG_MASK):
    h = nbd.NBD()
    h.set_handshake_flags(flags)
    h.set_request_structured_replies(False)
    h.connect_uri(uri)
    h.pwrite(b'x' * 1000, 5)
    assert h.pread(1002, 4) == b'\\0' + b'x' * 1000 + b'\\0'
    h.shutdown()
print('ok')
`)
    expect(output).toBe('ok\n')
  })
})
