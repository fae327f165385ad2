"""libnbd's Python module keeps many random requests in flight on four connections and checks every answer against a model.

    random_requests.py URI BASE.raw SEED OUT.raw

The export starts with the content of BASE.raw; OUT.raw gets what it must have at the end, flushed. The device is cut into regions,
and only one request is in flight in each, so that the model always knows the answer.
"""
import random
import sys
import nbd

uri, base, seed, out = sys.argv[1:]
random = random.Random(int(seed))
model = bytearray(open(base, 'rb').read())

REGION = 64 * 1024
SLOT = 4096
DEPTH = 48
REQUESTS = 4000

handles = []
for _ in range(4):
    handle = nbd.NBD()
    handle.add_meta_context('base:allocation')
    handle.connect_uri(uri)
    assert handle.get_size() == len(model)
    assert handle.can_multi_conn() and handle.can_fua() and handle.can_zero() and handle.can_trim()
    assert handle.can_meta_context('base:allocation')
    handles.append(handle)

busy = set()
counts = {}
# libnbd prints what a callback raises and goes on, so that failures are kept here.
failures = []


def check(holds, *what):
    if not holds:
        failures.append(what)


def range_in(region, aligned):
    """A range inside the region; its edges on slots if that is asked for."""
    if aligned:
        first = random.randrange(REGION // SLOT)
        return region * REGION + first * SLOT, random.randint(1, REGION // SLOT - first) * SLOT
    start = random.randrange(REGION)
    return region * REGION + start, random.randint(1, REGION - start)


def start(handle):
    region = random.randrange(len(model) // REGION)
    while region in busy:
        region = random.randrange(len(model) // REGION)
    busy.add(region)
    kind = random.choice(['write', 'write', 'write', 'zero', 'trim', 'read', 'read', 'structured', 'status'])
    counts[kind] = counts.get(kind, 0) + 1
    offset, length = range_in(region, kind == 'trim' or random.random() < 0.5)
    fua = nbd.CMD_FLAG_FUA if random.random() < 0.1 else 0

    def completed(error):
        check(error.value == 0, kind, offset, length, error.value)
        busy.remove(region)
        return 1

    if kind == 'write':
        data = random.randbytes(length)
        model[offset:offset + length] = data
        handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), offset, completion=completed, flags=fua)
    elif kind == 'zero':
        model[offset:offset + length] = bytes(length)
        flags = fua | (nbd.CMD_FLAG_NO_HOLE if random.random() < 0.5 else 0)
        handle.aio_zero(length, offset, completion=completed, flags=flags)
    elif kind == 'trim':
        model[offset:offset + length] = bytes(length)
        handle.aio_trim(length, offset, completion=completed, flags=fua)
    elif kind == 'read':
        buffer = nbd.Buffer(length)

        def compared(error):
            check(buffer.to_bytearray() == model[offset:offset + length], kind, offset, length)
            return completed(error)

        handle.aio_pread(buffer, offset, completion=compared)
    elif kind == 'structured':
        buffer = nbd.Buffer(length)
        found = bytearray(b'\xff' * length)
        covered = [0]

        def chunk(data, at, status, error):
            check(status in (nbd.READ_DATA, nbd.READ_HOLE), kind, offset, length, status)
            found[at - offset:at - offset + len(data)] = data if status == nbd.READ_DATA else bytes(len(data))
            covered[0] += len(data)
            return 0

        def reassembled(error):
            check(covered[0] == length and found == model[offset:offset + length], kind, offset, length)
            return completed(error)

        flags = nbd.CMD_FLAG_DF if random.random() < 0.3 else 0
        handle.aio_pread_structured(buffer, offset, chunk, completion=reassembled, flags=flags)
    else:
        def extents(context, at, entries, error):
            check(context == 'base:allocation' and at == offset, kind, context, at)
            for size, flags in zip(entries[::2], entries[1::2]):
                end = min(at + size, offset + length)
                check(not flags & nbd.STATE_ZERO or not any(model[at:end]), kind, at, size, flags)
                at += size
            return 0

        handle.aio_block_status(length, offset, extents, completion=completed)


sent = 0
while sent < REQUESTS or busy:
    for handle in handles:
        while sent < REQUESTS and handle.aio_in_flight() < DEPTH:
            start(handle)
            sent += 1
    for handle in handles:
        if handle.aio_in_flight() > 0:
            handle.poll(-1)
    if failures:
        sys.exit('wrong answers: %r' % failures[:10])

# With several connections allowed, a flush on one is a flush of all.
handles[2].flush()
for handle in handles:
    handle.shutdown()
open(out, 'wb').write(model)
print(sum(counts.values()), counts)
