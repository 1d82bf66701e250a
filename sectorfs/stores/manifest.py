"""What proves the bytes of a file: hashes of leaves, of blocks, and one digest over them.

A *leaf* of `LEAF` bytes is hashed as it is (BLAKE3); a *block* of `BLOCK` bytes by the hashes of
its leaves; the *digest* is over the file's size and the hashes of its blocks, that of a *directory*
over names, sizes and digests of its files. Each of the three has a key context of its own, so that
none can pass for another. Whoever has the digest can prove an *outline* (the block hashes, 1 MiB
for 32 GiB), whoever has that the leaf hashes of one block, and whoever has these 64 KiB of bytes.

A manifest has one form on disk and on the wire: a header of `HEADER` bytes (magic, version, size of
a leaf, size of the file, digest, zeros), the block hashes, the leaf hashes; integers little endian.
So the outline is its beginning, and the leaf hashes of a block are one short range of it. Nothing
is believed for being well formed: `decode` refuses what does not hash to its own digest, and what
that digest should be its caller knows from elsewhere.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable

from blake3 import blake3

from sectorfs.errors import BadInput
from sectorfs.stores.blocks import BLOCK, PIECE

try:
    from sectorfs.stores import _leaves

    NATIVE = _leaves.AVAILABLE
    """Many leaves are hashed at once, without the interpreter's lock."""
except ImportError:  # not built: the library alone does it
    NATIVE = False

__all__ = [
    "BLOCK",
    "HASH",
    "HEADER",
    "LEAF",
    "Manifest",
    "Outline",
    "block_at",
    "block_count",
    "block_hash",
    "directory_digest",
    "edge_blocks",
    "encoded_size",
    "file_hashes",
    "leaf_count",
    "leaf_hashes",
    "leaves_at",
    "outline_size",
    "parse_header",
]

LEAF = PIECE
"""Bytes of the smallest part that can be proved."""
HASH = 32
"""Bytes of every hash and digest here."""
HEADER = 64

Bytes = bytes | bytearray | memoryview

_PER_BLOCK = BLOCK // LEAF
_HEADER = struct.Struct("<8sIIQ32s8x")
_ENTRY = struct.Struct("<HQ32s")
_SIZE = struct.Struct("<Q")
_PIECE = 256 << 10  # stays in the processor's cache between the read and the hash
_MAGIC = b"sfs-mft\0"
_VERSION = 1

# Copied for each use: to derive the key costs more than to hash a block's leaf hashes.
_BLOCK_KEY = blake3(derive_key_context="sectorfs 2026-11 block: hashes of its leaves")
_FILE_KEY = blake3(derive_key_context="sectorfs 2026-11 file: size, hashes of its blocks")
_DIRECTORY_KEY = blake3(derive_key_context="sectorfs 2026-11 directory: names, sizes, digests")


def block_count(size: int) -> int:
    """Blocks of a file; the last may be short."""
    return -(-size // BLOCK)


def leaf_count(size: int) -> int:
    """Leaves of a file, or of a part of one that begins with a leaf; the last may be short."""
    return -(-size // LEAF)


def outline_size(size: int) -> int:
    """Bytes of an encoded outline."""
    return HEADER + HASH * block_count(size)


def encoded_size(size: int) -> int:
    """Bytes of an encoded manifest."""
    return outline_size(size) + HASH * leaf_count(size)


def block_at(block: int) -> int:
    """Where the hash of a block is in an encoded manifest."""
    return HEADER + HASH * block


def leaves_at(size: int, block: int) -> tuple[int, int]:
    """Where the leaf hashes of a block are in the encoded manifest, and how many bytes."""
    first = block * _PER_BLOCK
    count = min(_PER_BLOCK, leaf_count(size) - first)
    return outline_size(size) + HASH * first, HASH * count


def edge_blocks(size: int, start: int, end: int) -> tuple[int, ...]:
    """The blocks that a part of a file touches without having them whole: two at most.

    For these its receiver needs leaf hashes; for the others the outline is enough.
    """
    end = min(end, size)
    if start >= end:
        return ()
    first, last = start // BLOCK, (end - 1) // BLOCK
    whole_first = start % BLOCK == 0 and end >= min((first + 1) * BLOCK, size)
    whole_last = (end % BLOCK == 0 or end == size) and (first < last or whole_first)
    edges = [] if whole_first else [first]
    if last != first and not whole_last:
        edges.append(last)
    return tuple(edges)


def leaf_hashes(data: Bytes) -> bytes:
    """The hashes of the leaves of bytes that begin with one, 32 bytes each."""
    view = memoryview(data)
    whole = len(view) // LEAF * LEAF if NATIVE and len(view) >= 2 * LEAF else 0
    hashes = [
        blake3(view[start : start + LEAF]).digest() for start in range(whole, len(view), LEAF)
    ]
    return b"".join([_leaves.leaf_hashes(view[:whole]), *hashes] if whole else hashes)


def file_hashes(fd: int, offset: int, length: int) -> bytes:
    """The hashes of the leaves of a part of an open file that begins with one; blocks.

    Fewer where the file ends before.
    """
    whole = length // LEAF if NATIVE else 0
    found = [_leaves.hash_file(fd, offset, whole)] if whole else []
    if sum(map(len, found)) < HASH * whole:
        return b"".join(found)
    buffer = memoryview(bytearray(min(length - whole * LEAF, _PIECE)))
    for start in range(whole * LEAF, length, _PIECE):
        piece = buffer[: length - start]
        count = _fill(fd, piece, offset + start)
        if count < len(piece):  # of a leaf that is cut off nothing is said
            return b"".join([*found, leaf_hashes(piece[: count // LEAF * LEAF])])
        found.append(leaf_hashes(piece))
    return b"".join(found)


def block_hash(leaves: Bytes) -> bytes:
    """The hash of a block by the hashes of its leaves."""
    return _keyed(_BLOCK_KEY, leaves)


def directory_digest(files: Iterable[tuple[str, int, bytes]]) -> bytes:
    """The digest of a directory by name, size and digest of its files, in any order."""
    entries = []
    for name, size, digest in sorted(files):
        spelled = name.encode()
        _check(len(digest) == HASH, "a file of the directory has no digest", name)
        entries.append(_ENTRY.pack(len(spelled), size, digest) + spelled)
    return _keyed(_DIRECTORY_KEY, b"".join(entries))


def parse_header(header: Bytes) -> tuple[int, bytes]:
    """Size and digest that an encoded manifest claims; `BadInput` when it is none."""
    _check(len(header) >= HEADER, "is too short for a manifest")
    magic, version, leaf, size, digest = _HEADER.unpack(header[:HEADER])
    _check(magic == _MAGIC, "is not a manifest")
    _check((version, leaf) == (_VERSION, LEAF), "is a manifest of another version")
    _check(header[:HEADER] == _HEADER.pack(magic, version, leaf, size, digest), "has odd padding")
    return size, digest


class Outline:
    """The hashes of a file's blocks. Immutable."""

    __slots__ = ("blocks", "digest", "size")

    def __init__(self, size: int, blocks: bytes) -> None:
        _check(0 <= size < 1 << 63, "the size is out of range", size)
        _check(len(blocks) == HASH * block_count(size), "has not the hashes of this size", size)
        self.size = size
        """Bytes of the file."""
        self.blocks = blocks
        """One hash per block, 32 bytes each."""
        self.digest = _keyed(_FILE_KEY, _SIZE.pack(size) + blocks)
        """What the Index keeps of the file."""

    @classmethod
    def decode(cls, data: Bytes) -> Outline:
        """The outline at the beginning of an encoded manifest, and nothing behind it."""
        size, digest = parse_header(data)
        outline = cls(size, bytes(data[HEADER:]))
        _check(outline.digest == digest, "does not hash to its digest")
        return outline

    def encode(self) -> bytes:
        """The beginning of the encoded manifest."""
        return _HEADER.pack(_MAGIC, _VERSION, LEAF, self.size, self.digest) + self.blocks

    def check_leaves(self, block: int, leaves: Bytes) -> bool:
        """Whether these are the leaf hashes of a block of the file."""
        if not 0 <= block < block_count(self.size):
            return False
        wanted = self.blocks[HASH * block : HASH * (block + 1)]
        return len(leaves) == leaves_at(self.size, block)[1] and block_hash(leaves) == wanted


class Manifest:
    """Everything that proves a file, in any part of it. Immutable."""

    __slots__ = ("leaves", "outline")

    def __init__(self, size: int, blocks: bytes, leaves: bytes) -> None:
        self.outline = Outline(size, blocks)
        self.leaves = leaves
        """One hash per leaf, 32 bytes each."""
        _check(len(leaves) == HASH * leaf_count(size), "has not the leaves of its size", size)
        _check(_blocks(leaves) == blocks, "has leaves that do not make their blocks", size)

    @classmethod
    def of_leaves(cls, size: int, leaves: bytes) -> Manifest:
        """The manifest of a file with these leaf hashes."""
        made = cls.__new__(cls)
        made.outline = Outline(size, _blocks(leaves))
        made.leaves = leaves
        _check(len(leaves) == HASH * leaf_count(size), "has not the leaves of its size", size)
        return made

    @classmethod
    def decode(cls, data: Bytes) -> Manifest:
        """A manifest out of its encoded form; `BadInput` unless it proves itself whole."""
        size, digest = parse_header(data)
        # Before anything is cut: a header that lies about the size must not shift the parts.
        _check(len(data) == encoded_size(size), "has not the length of its size", size)
        cut = outline_size(size)
        manifest = cls(size, bytes(data[HEADER:cut]), bytes(data[cut:]))
        _check(manifest.digest == digest, "does not hash to its digest")
        return manifest

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.outline.size

    @property
    def blocks(self) -> bytes:
        """One hash per block, 32 bytes each."""
        return self.outline.blocks

    @property
    def digest(self) -> bytes:
        """What the Index keeps of the file."""
        return self.outline.digest

    def leaves_of(self, block: int) -> bytes:
        """The leaf hashes of one block."""
        return self.leaves[HASH * _PER_BLOCK * block : HASH * _PER_BLOCK * (block + 1)]

    def encode(self) -> bytes:
        """Its form on disk and on the wire."""
        return self.outline.encode() + self.leaves


def _blocks(leaves: bytes) -> bytes:
    step = HASH * _PER_BLOCK
    view = memoryview(leaves)
    return b"".join([block_hash(view[at : at + step]) for at in range(0, len(view), step)])


def _keyed(key: blake3, data: Bytes) -> bytes:
    hasher = key.copy()
    hasher.update(data)
    return hasher.digest()


def _fill(fd: int, view: memoryview, offset: int) -> int:
    done = 0
    while done < len(view):
        count = os.preadv(fd, [view[done:]], offset + done)
        if not count:
            break
        done += count
    return done


def _check(holds: bool, what: str, thing: object = "manifest") -> None:
    if not holds:
        raise BadInput(what, thing, "have it made again")
