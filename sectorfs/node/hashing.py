"""`sectorfs hash`: how far the hashing of a node's files is, and holding it up for a while.

A pause is noted in the repo: it holds over restarts, and may be set while no node runs.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from sectorfs.node.repo import Repo
from sectorfs.node.reports import HashedFileReport, HashReport
from sectorfs.stores.hasher import Hasher, HashStatus
from sectorfs.wire.jsonrpc import Method


class Hashing(Protocol):
    """Verbs on the hashing of a node's files."""

    async def report(self) -> HashReport:
        """How far it is."""

    async def pause(self, *, paused: bool) -> HashReport:
        """Hold it up, or let it go on."""


class LocalHashing:
    """The verbs, done here."""

    def __init__(self, repo: Repo, hasher: Hasher | None) -> None:
        self._repo = repo
        self._hasher = hasher

    async def report(self) -> HashReport:
        """See `Hashing.report`."""
        if self._hasher is None:
            return HashReport(state="stopped", paused=self._repo.hashing_paused())
        return hash_report(self._hasher.status())

    async def pause(self, *, paused: bool) -> HashReport:
        """See `Hashing.pause`."""
        self._repo.write_hashing_paused(paused=paused)
        if self._hasher is not None:
            if paused:
                self._hasher.pace.pause()
            else:
                self._hasher.pace.resume()
        return await self.report()


class HashingClient:
    """The verbs, asked of a running node."""

    def __init__(self, call: Callable[..., Awaitable[Any]]) -> None:
        self._call = call

    async def report(self) -> HashReport:
        """See `Hashing.report`."""
        found: HashReport = await self._call("Sectorfs.NodeHashing", result=HashReport)
        return found

    async def pause(self, *, paused: bool) -> HashReport:
        """See `Hashing.pause`."""
        found: HashReport = await self._call("Sectorfs.NodePauseHashing", paused, result=HashReport)
        return found


def hashing_methods(hashing: Hashing) -> list[Method]:
    """The table of these verbs' methods."""

    async def pause(paused: bool) -> HashReport:
        return await hashing.pause(paused=paused)

    return [
        Method(name="Sectorfs.NodeHashing", permission="read", params=(), handler=hashing.report),
        Method(name="Sectorfs.NodePauseHashing", permission="admin", params=(bool,), handler=pause),
    ]


def hash_report(status: HashStatus) -> HashReport:
    """A status as scripts see it."""
    return HashReport(
        state=status.state,
        paused=status.state == "paused",
        left_files=status.left_files,
        left_bytes=status.left_bytes,
        rate=round(status.rate),
        seconds_left=None if status.seconds_left is None else round(status.seconds_left),
        current=[
            HashedFileReport(
                sector=one.key.file.sector.name,
                file_type=one.key.file.file_type.dir_name,
                member=one.key.member,
                done=one.done,
                size=one.key.size,
            )
            for one in status.current
        ],
        problems=[*status.troubles, *status.bad],
    )
