"""python3 copy_changes.py URI SNAPSHOT FILE: makes FILE, a copy as of SNAPSHOT, a copy of what URI shows.

Reads only what changed and is not zero, and prints as JSON the ranges that changed and the bytes that were read.
"""

import json
import os
import sys

import nbd

uri, snapshot, path = sys.argv[1:]
bitmap = "qemu:dirty-bitmap:" + snapshot
piece_bytes = 8 << 20

handle = nbd.NBD()
handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
handle.add_meta_context(bitmap)
handle.connect_uri(uri)
assert handle.can_meta_context(bitmap), "the export does not know " + bitmap
size = handle.get_size()


def ranges(wanted, flag):
    """Ranges of a context that have a flag."""
    at = 0
    while at < size:
        found = []

        def keep(context, offset, entries, error):
            if context == wanted:
                found.extend(zip(entries[0::2], entries[1::2]))

        handle.block_status(min(size - at, 1 << 30), at, keep)
        assert found, "no status at %d" % at
        for length, flags in found:
            if flags & flag:
                yield at, min(length, size - at)
            at += length


changed = list(ranges(bitmap, 1))
zeros = list(ranges(nbd.CONTEXT_BASE_ALLOCATION, nbd.STATE_ZERO))
read_bytes = 0
with open(path, "r+b") as file:
    file.truncate(size)
    for start, length in changed:
        at, end = start, start + length
        while at < end:
            zero = next((zero for zero in zeros if zero[0] + zero[1] > at), (end, 0))
            is_zero = zero[0] <= at
            until = min(end, at + piece_bytes, sum(zero) if is_zero else zero[0])
            file.seek(at)
            file.write(bytes(until - at) if is_zero else handle.pread(until - at, at))
            read_bytes += 0 if is_zero else until - at
            at = until
handle.shutdown()
print(json.dumps({"changed": changed, "readBytes": read_bytes}))
