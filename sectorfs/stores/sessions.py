"""What is open, or comes, of other nodes' files: one session per content.

A session has a digest or has none. Once the Index tells the digest of a content that is open
without one, whoever reads it goes on in another session (`Surroundings.digested`), where all is
proved.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager

import msgspec
import trio

from sectorfs.errors import SectorFSError
from sectorfs.stores.manifest import Manifest
from sectorfs.stores.prover import Prover
from sectorfs.stores.range_requests import Carrier
from sectorfs.stores.sources import PeerSource
from sectorfs.stores.stream import Stream
from sectorfs.types import Facts, SectorFile


class Wanted(msgspec.Struct, frozen=True):
    """What is to be opened: a regular file of one content."""

    file: SectorFile
    member: str | None
    size: int
    mtime_ns: int
    facts: Facts
    """Of the whole sector file."""
    fills: bool
    """A copy may be made though nobody asked for one."""

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.file}/{self.member}" if self.member else str(self.file)

    @property
    def digest(self) -> bytes:
        """Of the whole sector file; empty while nobody told it."""
        return self.facts.digest

    def is_same(self, other: Wanted) -> bool:
        """The same file with the same content, as far as size and time tell."""
        return (self.file, self.member, self.size, self.mtime_ns) == (
            other.file,
            other.member,
            other.size,
            other.mtime_ns,
        )


class Surroundings(msgspec.Struct, frozen=True):
    """What sessions need of the rest of the node."""

    carrier: Callable[[Wanted], Carrier]
    sources: Callable[[SectorFile], Sequence[PeerSource]]
    """Best first."""
    sharing: Callable[[SectorFile], Collection[PeerSource]]
    """Those of them that may fill one file side by side."""
    failed: Callable[[SectorFile, PeerSource, SectorFSError], object]
    digested: Callable[[Wanted], Wanted]
    """The same with its digest, once somebody told it."""
    prover: Callable[[Wanted], Prover | None]
    """None while nobody told the digest."""
    keep: Callable[[Wanted, Manifest], Awaitable[None]]
    """Keeps the manifest of a copy that was proved."""
    reserve: Callable[[SectorFile, str | None, int], AbstractAsyncContextManager[None]]
    grow: Callable[[int], Awaitable[bool]]
    """Whether so many more bytes of files that are only read may stay on disk."""
    whole: Callable[[SectorFile, Facts], object]
    """Told of each file that is a whole copy now."""


class Fill:
    """The making of one copy."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.ended = trio.Event()
        self.asked = 0
        """How many asked for it and wait."""
        self.unasked = False
        """It goes on though nobody waits."""
        self.error: SectorFSError | None = None


class Session:
    """One content of one remote file while it is open, or being filled."""

    def __init__(self, wanted: Wanted, stream: Stream, *, allowed: int) -> None:
        self.wanted = wanted
        self.stream = stream
        self.handles = 0
        self.visits = 0
        """How often somebody came to use it."""
        self.attached = False
        """A partial file was asked for, and came or not."""
        self.attaching = trio.Lock()
        self.doubts: trio.Event | None = None
        """Set when what an earlier run left, without a digest, has been proved or not."""
        self.fill: Fill | None = None
        self.fill_after = 0.0
        """No copy is begun unasked before."""
        self.allowed = allowed
        """Bytes that may stay on disk before room is asked for."""
        self.growing = False
        self.finished: trio.Event | None = None
        """Made when the last byte came, set when the copy has its name."""
        self.is_copy = False
        self.lingers = False
        self.ended = False

    @property
    def done(self) -> int:
        """Bytes that are here."""
        return self.stream.arrivals.total

    @property
    def in_use(self) -> bool:
        """Somebody reads it, or a copy is being made."""
        return self.handles > 0 or self.fill is not None

    def is_idle(self) -> bool:
        """It is there, and nobody uses it or puts it into place."""
        finishing = self.finished is not None and not self.finished.is_set()
        return not self.ended and not self.in_use and not finishing
