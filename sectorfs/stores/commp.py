"""Piece commitments (CommP), and the commitment of a sector out of those of its pieces (CommD).

The padded bytes are the leaves, 32 bytes each, of a binary tree. A node above is SHA-256 of its two
children with the two top bits of its last byte cleared. A piece is a whole tree; what lies behind
the data up to the power of two is zeros, whose trees are known and cost nothing.

`Trees` joins whole trees from left to right in O(log n) memory; the hashers feed it with blocks.
Blocks do not depend on each other: several threads may hash blocks, one joins them in order. All
of it is plain computation; callers run `update` in a thread (the native module lets others run).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import msgspec

from sectorfs.errors import BadInput
from sectorfs.stores.fr32 import CHUNK, PADDED_CHUNK, Bytes, check_padded_piece, pad_into
from sectorfs.stores.piece_cids import check_commitment, piece_cid

try:
    from sectorfs.stores import _commp
except ImportError:
    METHODS: tuple[str, ...] = ("hashlib",)
else:
    METHODS = (*_commp.METHODS, "hashlib")

NODE = 32
BLOCK = 256 * 1024
"""Padded bytes hashed as one tree: data and nodes fit a core's cache, the calls do not count."""
_BUFFER = 4 * BLOCK
"""Bytes collected before they are hashed: each call may have to wait for the interpreter's lock."""


class Piece(msgspec.Struct, frozen=True):
    """A piece: what it holds, and how much."""

    commitment: bytes
    """CommP: 32 bytes with the two top bits of the last clear."""
    size: int
    """Padded bytes."""

    @property
    def cid(self) -> str:
        """The commitment as ``baga6ea4seaq…``."""
        return piece_cid(self.commitment)


def roots(data: Bytes, block: int, *, method: str = METHODS[0]) -> bytes:
    """The roots, one after another, of the trees over each `block` bytes of padded data."""
    view = memoryview(data).cast("B")
    check_padded_piece(block)
    if len(view) % block:
        raise BadInput(f"{len(view)} bytes to hash are no multiple of {block}")
    if method not in METHODS:
        raise BadInput("no such method", method, ", ".join(METHODS))
    if method == "hashlib":
        return b"".join(_root(view[at : at + block]) for at in range(0, len(view), block))
    return _commp.roots(view, block, method)


def _root(data: memoryview) -> bytes:
    """One root, where the native module was not built."""
    nodes = [_parent(data[at : at + 2 * NODE]) for at in range(0, len(data), 2 * NODE)]
    while len(nodes) > 1:
        nodes = [_parent(nodes[i] + nodes[i + 1]) for i in range(0, len(nodes), 2)]
    return nodes[0]


def _parent(children: Bytes) -> bytes:
    digest = hashlib.sha256(children).digest()
    return digest[:-1] + bytes((digest[-1] & 0x3F,))


def _zeros() -> tuple[bytes, ...]:
    """Commitments of pieces of zeros from 128 bytes to the largest."""
    node = bytes(NODE)
    nodes = []
    for height in range(1, 58):
        node = _parent(node + node)
        if height >= 2:
            nodes.append(node)
    return tuple(nodes)


_ZEROS = _zeros()


def zero_commitment(size: int) -> bytes:
    """The commitment of a piece of `size` padded bytes that are all zero."""
    return _ZEROS[check_padded_piece(size).bit_length() - PADDED_CHUNK.bit_length()]


class Trees:
    """Whole trees side by side from the left, joined as soon as two make one."""

    def __init__(self) -> None:
        self._trees: list[Piece] = []  # Invariant: sizes are powers of two and strictly descend
        self.size = 0
        """Padded bytes so far."""

    def join(self, piece: Piece) -> None:
        """Add a tree on the right; `BadInput` unless `size` is a multiple of the tree's."""
        check_commitment(piece.commitment)
        if self.size % check_padded_piece(piece.size):
            raise BadInput(
                f"a piece of {piece.size} bytes cannot begin at {self.size}", piece.cid, "align"
            )
        self.size += piece.size
        while self._trees and self._trees[-1].size == piece.size:
            left = self._trees.pop()
            piece = Piece(_parent(left.commitment + piece.commitment), 2 * piece.size)
        self._trees.append(piece)

    def align(self, size: int) -> None:
        """Add zeros until a tree of `size` bytes can begin."""
        check_padded_piece(size)
        while self.size % size:
            gap = self.size & -self.size
            self.join(Piece(zero_commitment(gap), gap))

    def finish(self, size: int) -> Piece:
        """One tree of `size` padded bytes, zeros on the right; `BadInput` if it is too small."""
        if self.size > check_padded_piece(size):
            raise BadInput(f"{self.size} padded bytes do not fit into a piece of {size}")
        if not self._trees:
            return Piece(zero_commitment(size), size)
        self.align(size)
        (whole,) = self._trees
        return whole


def combine(pieces: Iterable[Piece], size: int) -> Piece:
    """The commitment (CommD) of `size` padded bytes that begin with the pieces in order.

    Each piece begins at the next multiple of its own size, as when pieces are added to a sector.
    """
    trees = Trees()
    for piece in pieces:
        trees.align(piece.size)
        trees.join(piece)
    return trees.finish(size)


class PaddedHasher:
    """The commitment of a stream of padded bytes that come in parts of any size."""

    def __init__(self) -> None:
        self._trees = Trees()
        self._buffer = memoryview(bytearray(_BUFFER))
        self._filled = 0  # Invariant: less than the buffer

    @property
    def size(self) -> int:
        """Padded bytes so far."""
        return self._trees.size + self._filled

    @property
    def room(self) -> memoryview:
        """Where the next bytes may be written in place; then `advance`."""
        return self._buffer[self._filled :]

    def advance(self, count: int) -> None:
        """Take the first bytes of `room`; `BadInput` when it was smaller."""
        if not 0 <= count <= _BUFFER - self._filled:
            raise BadInput(f"{count} bytes in a room of {_BUFFER - self._filled}")
        self._filled += count
        if self._filled == _BUFFER:
            self._filled = 0
            self._add(self._buffer)

    def update(self, data: Bytes) -> None:
        """Take the next bytes."""
        view = memoryview(data).cast("B")
        while view:
            whole = 0 if self._filled else len(view) // BLOCK * BLOCK
            if whole:
                self._add(view[:whole])
            else:
                part = view[: _BUFFER - self._filled]
                whole = len(part)
                self.room[:whole] = part
                self.advance(whole)
            view = view[whole:]

    def _add(self, blocks: memoryview) -> None:
        nodes = roots(blocks, BLOCK)
        for at in range(0, len(nodes), NODE):
            self._trees.join(Piece(nodes[at : at + NODE], BLOCK))

    def finish(self, size: int | None = None) -> Piece:
        """The commitment of all bytes and zeros up to `size` (None: up to a power of two).

        `BadInput` when there is not one byte, or more than `size`. Nothing may follow.
        """
        if self.size == 0:
            raise BadInput("no bytes: an empty piece has no commitment")
        wanted = _power(self.size) if size is None else check_padded_piece(size)
        if self.size > wanted:
            raise BadInput(f"{self.size} padded bytes do not fit into a piece of {wanted}")
        whole = self._filled // BLOCK * BLOCK
        rest = self._filled - whole
        self._add(self._buffer[:whole])
        if rest:
            last = _power(rest)
            self._buffer[whole + rest : whole + last] = bytes(last - rest)
            tail = self._buffer[whole : whole + last]
            self._trees.join(Piece(roots(tail, last), last))
        self._filled = 0
        return self._trees.finish(wanted)


def _power(size: int) -> int:
    """The smallest size of a padded piece that holds so many padded bytes."""
    return max(PADDED_CHUNK, 1 << (size - 1).bit_length())


class PieceHasher:
    """The commitment of a stream of unpadded bytes: what clients store and deals are made of."""

    def __init__(self) -> None:
        self._hasher = PaddedHasher()
        self._rest = bytearray()  # Invariant: less than a chunk
        self.size = 0
        """Unpadded bytes so far."""

    def update(self, data: Bytes) -> None:
        """Take the next bytes."""
        view = memoryview(data).cast("B")
        self.size += len(view)
        if self._rest:
            missing = CHUNK - len(self._rest)
            self._rest += view[:missing]
            view = view[missing:]
            if len(self._rest) < CHUNK:
                return
            self._pad(memoryview(bytes(self._rest)))
            self._rest.clear()
        whole = len(view) // CHUNK * CHUNK
        self._pad(view[:whole])
        self._rest += view[whole:]

    def _pad(self, chunks: memoryview) -> None:
        """Pad whole chunks to where they are hashed from."""
        while chunks:
            room = self._hasher.room
            part = chunks[: len(room) // PADDED_CHUNK * CHUNK]
            self._hasher.advance(pad_into(part, room))
            chunks = chunks[len(part) :]

    def finish(self, size: int | None = None) -> Piece:
        """The commitment with zeros up to a padded size; errors as `PaddedHasher.finish`."""
        if self._rest:
            self._pad(memoryview(bytes(self._rest).ljust(CHUNK, b"\0")))
            self._rest.clear()
        return self._hasher.finish(size)


def commit(data: Bytes, size: int | None = None) -> Piece:
    """The commitment of unpadded bytes in memory."""
    hasher = PieceHasher()
    hasher.update(data)
    return hasher.finish(size)
