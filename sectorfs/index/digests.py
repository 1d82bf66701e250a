"""The digests of rows, one after the other: a column that costs nothing while no row has one.

A cluster hashes its files for weeks, and a catalog without a digest must be as small as one that
never heard of them. So the bytes are there only while a row has a digest; a row that has none has
zeros, which are nobody's digest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sectorfs.types import DIGEST_SIZE

NO_DIGEST = bytes(DIGEST_SIZE)
"""What stands for none."""


class Digests:
    """A column; equal when all rows are.

    Invariant: the bytes are kept if, and only if, one of them is not zero.
    """

    __slots__ = ("_all", "_count")

    def __init__(self, count: int = 0, known: bytes | bytearray = b"") -> None:
        """`known` are those of all rows, or nothing; its bytes become ours."""
        assert len(known) in (0, count * DIGEST_SIZE)
        self._count = count
        self._all: bytearray | None = None
        self._keep(known)

    @classmethod
    def of(cls, digests: Sequence[bytes | None]) -> Digests:
        """A column of digests, any of which may be empty or None."""
        if not any(digests):
            return cls(len(digests))
        return cls(len(digests), b"".join(one or NO_DIGEST for one in digests))

    @property
    def known(self) -> bytes | bytearray:
        """The digests of all rows as one; empty while no row has one."""
        return b"" if self._all is None else self._all

    def __len__(self) -> int:
        return self._count

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Digests):
            return NotImplemented
        return self._count == other._count and self.known == other.known

    __hash__ = None  # type: ignore[assignment]  # it changes

    def __iter__(self) -> Iterator[bytes]:
        return (self[position] for position in range(self._count))

    def __getitem__(self, position: int) -> bytes:
        """The digest of a row; empty when it has none."""
        if self._all is None:
            return b""
        start = position * DIGEST_SIZE
        found = bytes(self._all[start : start + DIGEST_SIZE])
        return b"" if found == NO_DIGEST else found

    def part(self, start: int, end: int) -> Digests:
        """A copy of some rows."""
        if self._all is None:
            return Digests(end - start)
        return Digests(end - start, self._all[start * DIGEST_SIZE : end * DIGEST_SIZE])

    def put(self, position: int, digest: bytes) -> None:
        """Give a row another digest, or an empty one."""
        if self._all is None and not digest:
            return
        start = position * DIGEST_SIZE
        self._made()[start : start + DIGEST_SIZE] = digest or NO_DIGEST
        if not digest:
            self._keep(self._made())

    def insert(self, position: int, digest: bytes) -> None:
        """Put a row before another."""
        if self._all is not None or digest:
            start = position * DIGEST_SIZE
            self._made()[start:start] = digest or NO_DIGEST
        self._count += 1

    def __delitem__(self, rows: slice) -> None:
        """Take rows out."""
        start, end, _ = rows.indices(self._count)
        self._count -= end - start
        if self._all is not None:
            del self._all[start * DIGEST_SIZE : end * DIGEST_SIZE]
            self._keep(self._all)

    def extend(self, other: Digests) -> None:
        """Append the rows of another column."""
        if self._all is not None or other._all is not None:
            self._made().extend(other.known or bytes(other._count * DIGEST_SIZE))
        self._count += other._count

    def _made(self) -> bytearray:
        if self._all is None:
            self._all = bytearray(self._count * DIGEST_SIZE)
        return self._all

    def _keep(self, known: bytes | bytearray) -> None:
        if known == bytes(len(known)):
            self._all = None
        else:
            self._all = known if isinstance(known, bytearray) else bytearray(known)
