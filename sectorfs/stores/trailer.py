"""Partial files: unsealed sectors with a trailer that says which bytes are there.

A file is ``sector_size`` bytes of padded data, an RLE+ bitmap with a bit per byte, and the length
of the bitmap in four little-endian bytes. A file of exactly ``sector_size`` bytes has no trailer
and is all there. Functions block and raise `OSError`: they run in the lane of the storage, those
that change a file by `Lane.finish`.

What a crash leaves. Data is synced before the trailer names it, and a trailer gives up bytes
before they are punched out, so a bitmap that can be read never claims bytes that are not there:

* A trailer as long as the old one, or longer, within one disk sector (512 bytes: all but very
  fragmented files) is one write. A killed process leaves the old or the new one; a power cut does
  as well if the length stays, else data and length may reach the disk apart.
* Any other is written while the file has a length that no valid file has, first a byte more than
  its data, then a byte 255 more than the new trailer; each step is synced. A mixture of two
  trailers never passes for a bitmap.

The format has one place for the trailer, found by the length of the file, with no checksum and no
second copy. So where length and content cannot change in one step, a crash in between leaves a file
that is refused; its data is whole, but nobody knows which of it. For the same reason an empty file
gets its trailer before its blocks: at ``sector_size`` bytes it would claim to be complete.

One writer at a time: whoever changes a file holds the write lock of its sector.
"""

from __future__ import annotations

import logging
import os
import threading

from sectorfs.errors import BadInput, BadRange, Refused, SourceFailed
from sectorfs.stores import holes, rle
from sectorfs.stores.fr32 import padded
from sectorfs.stores.lanes import Descriptor
from sectorfs.stores.rle import Runs

log = logging.getLogger(__name__)

MAX_BITMAP = 16 * 2**20
"""Bytes of bitmap that are read at all: more than `rle.MAX_RUNS` runs of a 64 GiB sector need."""

LENGTH_BYTES = 4
"""The last bytes of a trailer: how long its bitmap is, little-endian."""
MIN_LENGTH = LENGTH_BYTES
"""Bytes of the shortest trailer, that of a file with nothing in it."""
MAX_LENGTH = MAX_BITMAP + LENGTH_BYTES

_LARGE_BITMAP = 2**20
_DISK_SECTOR = 512
_NO_LENGTH = b"\xff"  # after the length it makes one of 4 GiB
_HINT = "unseal the sector again, or remove this copy"


class PartialFile:
    """An open partial file; made by `open` or `create`. Safe to use from several threads.

    The descriptor stays the caller's, who closes it.
    """

    def __init__(
        self, descriptor: Descriptor, *, sector_size: int, thing: object, allocated: Runs
    ) -> None:
        self.descriptor = descriptor
        self.sector_size = sector_size
        self.thing = thing
        """The path or sector named in errors."""
        self.allocated = allocated
        """Padded bytes that are there, as of the last change through this object."""
        self._changing = threading.Lock()  # one change at a time, each from reading to syncing

    @classmethod
    def open(cls, descriptor: Descriptor, *, sector_size: int, thing: object) -> PartialFile:
        """Read and check the trailer; `SourceFailed` says what is wrong with it."""
        with descriptor as fd:
            allocated, _ = _read_trailer(fd, sector_size, thing)
        return cls(descriptor, sector_size=sector_size, thing=thing, allocated=allocated)

    @classmethod
    def create(cls, descriptor: Descriptor, *, sector_size: int, thing: object) -> PartialFile:
        """Give an empty file its blocks and an empty trailer; `Refused` if it has bytes."""
        with descriptor as fd:
            if os.fstat(fd).st_size:
                raise Refused("cannot become a partial file: it is not empty", thing)
            _write_all(fd, _trailer(Runs()), sector_size)
            if not holes.allocate(fd, sector_size):
                log.info("%s: the file system reserves no space", thing)
            os.fdatasync(fd)
        return cls(descriptor, sector_size=sector_size, thing=thing, allocated=Runs())

    def has_allocated(self, offset: int, size: int) -> bool:
        """True when every byte of a range is there, in *unpadded* numbers as peers ask it."""
        if offset < 0 or size < 0:
            raise BadRange("a range below zero", self.thing, f"asked for {size} from {offset}")
        start = padded(offset)
        return self.allocated.covers(start, start + padded(size))

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the padded data; `BadRange` unless every one of them is there."""
        self._check(offset, size)
        if not self.allocated.covers(offset, offset + size):
            raise BadRange("part of the range is not unsealed", self.thing, f"{size} from {offset}")
        with self.descriptor as fd:
            return _read_exactly(fd, size, offset, self.thing)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write padded data; it counts once `mark` was called for it."""
        self._check(offset, len(data))
        with self.descriptor as fd:
            _write_all(fd, data, offset)

    def mark(self, offset: int, size: int) -> None:
        """Declare a padded range to be there; what was written is synced first."""
        self._check(offset, size)
        with self._changing, self.descriptor as fd:
            os.fdatasync(fd)
            # From the disk, not from memory: two marks through one object must both last.
            held, end = _read_trailer(fd, self.sector_size, self.thing)
            self._replace(fd, held, held.union(Runs.span(offset, size)), end=end)

    def free(self, offset: int, size: int) -> None:
        """Declare a padded range to be missing and give its blocks back."""
        self._check(offset, size)
        with self._changing, self.descriptor as fd:
            held, end = _read_trailer(fd, self.sector_size, self.thing)
            self._replace(fd, held, held.minus(Runs.span(offset, size)), end=end)
            if not holes.punch(fd, offset, size):
                log.info("%s: the file system gives no space back", self.thing)

    def _replace(self, fd: int, held: Runs, wanted: Runs, *, end: int) -> None:
        """Put another trailer after the data of a file that ends at `end`."""
        if wanted != held:
            trailer = _trailer(wanted)
            larger = max(end - self.sector_size, len(trailer)) > _DISK_SECTOR
            if larger or self.sector_size + len(trailer) < end:
                os.ftruncate(fd, self.sector_size + 1)
                os.fdatasync(fd)
                _write_all(fd, trailer + _NO_LENGTH, self.sector_size)
                os.fdatasync(fd)
                os.ftruncate(fd, self.sector_size + len(trailer))
            else:
                _write_all(fd, trailer, self.sector_size)
            os.fdatasync(fd)
        self.allocated = wanted

    def _check(self, offset: int, size: int) -> None:
        if offset < 0 or size < 0 or offset + size > self.sector_size:
            hint = f"{size} from {offset}, the sector has {self.sector_size}"
            raise BadRange("outside the sector", self.thing, hint)


def _trailer(allocated: Runs) -> bytes:
    bitmap = rle.encode(allocated)
    return bitmap + len(bitmap).to_bytes(LENGTH_BYTES, "little")


def _read_trailer(fd: int, sector_size: int, thing: object) -> tuple[Runs, int]:
    """What a file says is there, and its length."""
    size = os.fstat(fd).st_size
    if size < sector_size:
        raise SourceFailed(f"{size} bytes, less than the sector's {sector_size}", thing, _HINT)
    if size == sector_size:
        return Runs.span(0, sector_size), size
    tail = _read_exactly(fd, LENGTH_BYTES, size - LENGTH_BYTES, thing)
    length = int.from_bytes(tail, "little")
    if sector_size + length + LENGTH_BYTES != size:
        what = f"trailer of {size - sector_size} bytes with a bitmap of {length}"
        raise SourceFailed(what, thing, _HINT)
    if length > _LARGE_BITMAP:
        log.warning("%s: the trailer is large: %d bytes", thing, length)
    if length > MAX_BITMAP:
        raise SourceFailed(f"trailer with a bitmap of {length} bytes", thing, _HINT)
    return _bitmap(_read_exactly(fd, length, sector_size, thing), sector_size, thing), size


def decode(data: bytes, *, sector_size: int, thing: object) -> Runs:
    """What a whole trailer, read from wherever the file is, says is there; checked as by `open`."""
    bitmap, length = data[:-LENGTH_BYTES], data[-LENGTH_BYTES:]
    if len(length) < LENGTH_BYTES or int.from_bytes(length, "little") != len(bitmap):
        raise SourceFailed(f"{len(data)} bytes are no trailer", thing, _HINT)
    return _bitmap(bitmap, sector_size, thing)


def _bitmap(data: bytes, sector_size: int, thing: object) -> Runs:
    try:
        allocated = rle.decode(data)
    except BadInput as exc:
        raise SourceFailed(f"trailer with a bad bitmap: {exc}", thing, _HINT) from exc
    if allocated.last is not None and allocated.last > sector_size:
        what = f"trailer names byte {allocated.last} of a sector of {sector_size}"
        raise SourceFailed(what, thing, _HINT)
    # Other implementations let the bit just past the end pass; there is no such byte to serve.
    return allocated.intersection(Runs.span(0, sector_size))


def _read_exactly(fd: int, size: int, offset: int, thing: object) -> bytes:
    data = b""
    while len(data) < size:
        part = os.pread(fd, size - len(data), offset + len(data))
        if not part:
            raise SourceFailed("the file became shorter while it was read", thing, _HINT)
        data = data + part if data else part
    return data


def _write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written
