"""fr32: the padding of unsealed sectors, 127 bytes to 128 and back, whole and by ranges.

Every 127 bytes are one little-endian number of 1016 bits. Four limbs of 254 bits, the low one
first, are written as 32 little-endian bytes each, so that each is an element of the proofs' field;
the two top bits of bytes 31, 63, 95 and 127 are zero. Bytes of one chunk depend on no other chunk.

Sizes and positions are *unpadded* (what a client stored) or *padded* (what lies on disk). A range
of unpadded bytes is read through a `Window`: arithmetic only, the caller reads. Long work belongs
in a thread (`Lane`): the native module lets others run meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from sectorfs.errors import BadInput, BadRange

try:
    from sectorfs.stores._fr32 import pad as _pad
    from sectorfs.stores._fr32 import unpad as _unpad
except ImportError:
    from sectorfs.stores.fr32_integers import pad as _pad
    from sectorfs.stores.fr32_integers import unpad as _unpad

Bytes = bytes | bytearray | memoryview

CHUNK = 127
PADDED_CHUNK = 128
MAX_PIECE = 1 << 62
"""Largest padded size that is taken for a piece: the largest power of two in 63 bits."""


def padded(size: int) -> int:
    """Padded bytes of so many unpadded ones; a position in the same way."""
    return size + size // CHUNK


def unpadded(size: int) -> int:
    """Unpadded bytes of so many padded ones; a position in the same way."""
    return size - size // PADDED_CHUNK


def check_padded_piece(size: int) -> int:
    """The size, if a padded piece can have it: a power of two from 128 on; else `BadInput`."""
    if not PADDED_CHUNK <= size <= MAX_PIECE or size & (size - 1):
        raise BadInput("not the size of a padded piece", size, "a power of two from 128 on")
    return size


def check_unpadded_piece(size: int) -> int:
    """The size, if an unpadded piece can have it: 127 times a power of two; else `BadInput`."""
    count = size // CHUNK
    if size % CHUNK or not 1 <= count <= MAX_PIECE // PADDED_CHUNK or count & (count - 1):
        raise BadInput("not the size of an unpadded piece", size, "127 times a power of two")
    return size


def piece_size(payload: int) -> int:
    """The smallest padded piece that holds so many unpadded bytes; `BadInput` when none does."""
    if not 1 <= payload <= unpadded(MAX_PIECE):
        raise BadInput("no piece holds so many bytes", payload)
    chunks = -(-payload // CHUNK)
    return PADDED_CHUNK << (chunks - 1).bit_length()


def pad(data: Bytes) -> bytearray:
    """Whole chunks of 127 bytes padded; `BadInput` when bytes remain."""
    size = memoryview(data).nbytes
    out = bytearray(size // CHUNK * PADDED_CHUNK)
    pad_into(data, out)
    return out


def pad_into(data: Bytes, out: bytearray | memoryview) -> int:
    """`pad` to the beginning of a buffer that is large enough; the bytes written."""
    view = memoryview(data).cast("B")
    if len(view) % CHUNK:
        raise BadInput(f"{len(view)} bytes to pad are no multiple of {CHUNK}")
    _pad(view, out)
    return len(view) // CHUNK * PADDED_CHUNK


def unpad(data: Bytes, *, thing: object = "", offset: int = 0) -> bytearray:
    """Whole chunks of 128 bytes unpadded; `BadInput` when bytes remain or are not fr32.

    The error names `thing` and a position in it; `offset` is where `data` begins there.
    """
    view = memoryview(data).cast("B")
    if len(view) % PADDED_CHUNK:
        raise BadInput(f"{len(view)} bytes to unpad are no multiple of {PADDED_CHUNK}", thing)
    out = bytearray(len(view) // PADDED_CHUNK * CHUNK)
    bad = _unpad(view, out)
    if bad >= 0:
        raise BadInput(
            f"not fr32: one of the two top bits of byte {offset + bad} is set",
            thing,
            "the bytes are damaged, or no padded data",
        )
    return out


class Padder:
    """Pads a stream that comes in parts of any size; holds less than one chunk."""

    def __init__(self) -> None:
        self._rest = b""

    def update(self, data: Bytes) -> bytearray:
        """The padded bytes of all chunks that are complete now."""
        head, self._rest = _split(self._rest, data, CHUNK)
        return pad(head)

    def finish(self) -> None:
        """The stream ends; `BadInput` when it does so inside a chunk."""
        if self._rest:
            raise BadInput(f"the data end {len(self._rest)} bytes into a chunk of {CHUNK}")


class Unpadder:
    """Unpads a stream that comes in parts of any size; holds less than one chunk."""

    def __init__(self, *, thing: object = "", offset: int = 0) -> None:
        self._rest = b""
        self._thing = thing
        self._offset = offset

    def update(self, data: Bytes) -> bytearray:
        """The unpadded bytes of all chunks that are complete now; `BadInput` as `unpad`."""
        head, self._rest = _split(self._rest, data, PADDED_CHUNK)
        out = unpad(head, thing=self._thing, offset=self._offset)
        self._offset += len(head)
        return out

    def finish(self) -> None:
        """The stream ends; `BadInput` when it does so inside a chunk."""
        if self._rest:
            raise BadInput(
                f"the data end {len(self._rest)} bytes into a chunk of {PADDED_CHUNK}", self._thing
            )


def _split(rest: bytes, data: Bytes, size: int) -> tuple[Bytes, bytes]:
    """What was kept and what came, cut behind the last whole chunk."""
    joined = memoryview(b"".join((rest, data)) if rest else data).cast("B")
    whole = len(joined) // size * size
    return joined[:whole], bytes(joined[whole:])


class Window(msgspec.Struct, frozen=True):
    """A range of unpadded bytes, and the padded bytes that must be read for it."""

    offset: int
    """Padded position to read from; a multiple of 128."""
    length: int
    """Padded bytes to read; a multiple of 128."""
    skip: int
    """Unpadded bytes before the range, less than a chunk."""
    size: int
    """Unpadded bytes of the range."""

    def cut(self, data: Bytes, *, thing: object = "") -> memoryview:
        """The range, out of the padded bytes read for it; `BadInput` when some are missing."""
        read = memoryview(data).nbytes
        if read != self.length:
            raise BadInput(f"{read} of {self.length} padded bytes to unpad", thing)
        whole = unpad(data, thing=thing, offset=self.offset)
        return memoryview(whole)[self.skip : self.skip + self.size]


def window(start: int, stop: int) -> Window:
    """How to read unpadded bytes `start` to `stop`; `BadRange` unless 0 ≤ start ≤ stop."""
    if not 0 <= start <= stop <= unpadded(MAX_PIECE):
        raise BadRange("no range of unpadded bytes", f"{start} to {stop}")
    first = start // CHUNK
    if start == stop:
        return Window(first * PADDED_CHUNK, 0, 0, 0)
    last = -(-stop // CHUNK)
    return Window(
        first * PADDED_CHUNK, (last - first) * PADDED_CHUNK, start - first * CHUNK, stop - start
    )


def windows(start: int, stop: int, *, step: int) -> Iterator[Window]:
    """The same range in pieces of at most `step` padded bytes to read (at least one chunk)."""
    window(start, stop)
    unpadded_step = max(1, step // PADDED_CHUNK) * CHUNK
    while start < stop:
        end = min(stop, start // CHUNK * CHUNK + unpadded_step)
        yield window(start, end)
        start = end
