"""Verifying the sector files of a node, over RPC: what is ordered, how far it is, what was found.

A run belongs to whoever asked for it, and ends when that one leaves; the pass of a storage that it
was in stays where it is, and the next run goes on from there.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Protocol, TypeVar

import msgspec

from sectorfs.errors import BadInput, NotFound, Unreachable
from sectorfs.index.catalog import Catalog
from sectorfs.node.reports import ScrubReport, VerifyingReport, rfc3339
from sectorfs.stores.local import LocalStore
from sectorfs.stores.local_path import LocalPath
from sectorfs.stores.scrub_notes import StorageNotes
from sectorfs.stores.scrubber import Run, Scrubber
from sectorfs.stores.verdicts import Told
from sectorfs.types import (
    FileType,
    SectorFile,
    SectorID,
    parse_file_type,
    parse_sector,
)
from sectorfs.wire.jsonrpc import Method

T = TypeVar("T")

VERIFY_PATIENCE = 90 * 86400.0
"""Seconds that one run may take: 250 TiB are read in weeks."""
PROBLEMS = 5
"""Of these, findings that are shown as problems of the node."""
SHOWN = 20
"""Findings of a storage that `status` names."""


class VerifyOrder(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be verified: named sector files, or all of a storage, or of every one."""

    files: list[tuple[str, str]] = []
    """Type, or an empty text for all of them, and sector."""
    whole: bool = False
    """All files, of `storage` or of every storage of the node."""
    storage: str | None = None
    """An id, or a path of the node."""
    file_type: str | None = None
    """Of `whole`: only these, which is no pass that could be gone on with."""
    repair: bool = False
    anew: bool = False
    """Begin a pass from the start."""


class VerifyReport(msgspec.Struct, frozen=True, kw_only=True):
    """A run that came to its end."""

    files: int
    """Sector files."""
    bytes: int
    seconds: float
    states: dict[str, int]
    """Regular files by what was found."""
    findings: list[Told]
    """Named files: each of them; else those that are not well."""
    more: int
    """Findings beyond those, which are many."""
    stopped: dict[str, str]
    """Storages that could not be read to the end, and why."""
    paths: dict[str, str]
    """Of the node, by storage."""


class Verifying(Protocol):
    """The verbs."""

    async def verify(self, order: VerifyOrder) -> VerifyReport:
        """Look at every byte of what is ordered."""

    async def verifying(self) -> list[VerifyingReport]:
        """Runs under way, of commands and by schedule."""


class LocalVerifying:
    """The verbs, done here."""

    def __init__(
        self,
        *,
        scrubber: Scrubber,
        catalog: Catalog,
        local: LocalStore,
        caught_up: Callable[[], Awaitable[None]],
    ) -> None:
        """`caught_up` waits until the catalog knows all that the Index does, within reason."""
        self._scrubber = scrubber
        self._catalog = catalog
        self._local = local
        self._caught_up = caught_up

    async def verify(self, order: VerifyOrder) -> VerifyReport:
        """See `Verifying.verify`; `NotFound` for what is not on this node."""
        if order.whole == bool(order.files):
            raise BadInput("names sectors or a storage, and not both", "verify")
        paths = self._paths(order.storage)
        with suppress(Unreachable):  # what is known will do
            await self._caught_up()
        exact = bool(order.files) and all(file_type for file_type, _ in order.files)
        what = self._what(order, paths)
        async with self._scrubber.run(
            what, repair=order.repair, primary=exact, every=not order.whole
        ) as run:
            if not order.whole:
                await self._scrubber.verify(run, self._named(order, paths))
            elif order.file_type is not None:
                await self._scrubber.verify(run, self._of_type(order.file_type, paths))
            else:
                await self._scrubber.scrub(run, paths, anew=order.anew)
        return _report(run, self._local.paths())

    async def verifying(self) -> list[VerifyingReport]:
        """See `Verifying.verifying`."""
        return [_progress(run) for run in self._scrubber.runs]

    def reports(self) -> list[ScrubReport]:
        """What is known of each storage of this node that was ever looked at."""
        found = []
        for path in self._local.paths():
            notes = self._scrubber.notes.of(path.storage)
            if notes.now is not None or notes.last is not None or notes.findings:
                found.append(_scrub_report(path, notes))
        return found

    def _what(self, order: VerifyOrder, paths: list[LocalPath]) -> str:
        if order.whole:
            return ", ".join(path.path for path in paths)
        names = [
            f"{file_type}/{sector}" if file_type else sector for file_type, sector in order.files
        ]
        return names[0] if len(names) == 1 else f"{len(names)} sectors"

    def _paths(self, storage: str | None) -> list[LocalPath]:
        if storage is None:
            return list(self._local.paths())
        name = storage.rstrip("/") or storage
        found = [
            path
            for path in self._local.paths()
            if path.storage == storage or name in (path.path, path.real)
        ]
        if not found:
            raise NotFound("is no storage path of this node", storage, "ask the node that has it")
        return found

    def _of_type(self, name: str, paths: list[LocalPath]) -> list[tuple[LocalPath, SectorFile]]:
        file_type = _parsed(parse_file_type, name)
        found: list[tuple[LocalPath, SectorFile]] = []
        for path in paths:
            after: SectorFile | None = None
            while files := self._catalog.files_of(path.storage, after=after):
                found += [(path, file) for file in files if file.file_type is file_type]
                after = files[-1]
        return found

    def _named(
        self, order: VerifyOrder, paths: list[LocalPath]
    ) -> list[tuple[LocalPath, SectorFile]]:
        found: list[tuple[LocalPath, SectorFile]] = []
        for name, text in order.files:
            sector = _parsed(parse_sector, text)
            types = [_parsed(parse_file_type, name)] if name else list(FileType)
            here = self._held(sector, types, paths)
            if not here:
                hint = "see `sectorfs storage find`, and ask the node that has it"
                raise NotFound("not on this node", f"{name}/{text}" if name else text, hint)
            found += here
        return list(dict.fromkeys(found))

    def _held(
        self, sector: SectorID, types: list[FileType], paths: list[LocalPath]
    ) -> list[tuple[LocalPath, SectorFile]]:
        found = []
        for file_type in types:
            file = SectorFile(file_type, sector)
            entry = self._catalog.entry(file)
            holders = {one.storage for one in entry.declarations} if entry is not None else set()
            found += [(path, file) for path in paths if path.storage in holders]
        return found


def _parsed(parse: Callable[[str], T], text: str) -> T:
    try:
        return parse(text)
    except ValueError as exc:
        raise BadInput(str(exc), text[:200]) from exc


def _report(run: Run, paths: Sequence[LocalPath]) -> VerifyReport:
    return VerifyReport(
        files=run.files,
        bytes=run.bytes,
        seconds=run.seconds,
        states={state: count for state, count in run.states.items() if count},
        findings=run.findings,
        more=run.more,
        stopped={str(storage): why for storage, why in run.stopped.items()},
        paths={path.storage: path.path for path in paths},
    )


def _progress(run: Run) -> VerifyingReport:
    rate = run.bytes / max(run.seconds, 1e-3)
    left = None
    if run.total is not None and run.bytes and run.bytes <= run.total:
        left = (run.total - run.bytes) / rate
    return VerifyingReport(
        what=run.what,
        file=run.file,
        files=run.files,
        done=run.bytes,
        size=run.total,
        rate=rate,
        left=left,
        found=run.found,
    )


def _scrub_report(path: LocalPath, notes: StorageNotes) -> ScrubReport:
    now, last = notes.now, notes.last
    findings = notes.findings
    return ScrubReport(
        storage=path.storage,
        path=path.path,
        begun=rfc3339(now.begun_ns) if now is not None else None,
        files=now.files if now is not None else 0,
        bytes=now.bytes if now is not None else 0,
        stopped=(now.stopped or None) if now is not None else None,
        ended=rfc3339(last.ended_ns) if last is not None else None,
        states=last.states if last is not None else {},
        findings=findings[:SHOWN],
        more=notes.more + max(0, len(findings) - SHOWN),
    )


def scrub_problems(report: ScrubReport) -> list[str]:
    """What an operator should look at of a storage path."""
    found = [
        f"{report.path}: {one.name} is {one.state}: see `sectorfs sector verify {one.sector}`"
        for one in report.findings[:PROBLEMS]
    ]
    more = report.more + len(report.findings) - len(found)
    if more:
        found.append(f"{report.path}: {more} more files are not well: see `sectorfs status --json`")
    if report.stopped:
        found.append(f"{report.path}: its scrub stopped: {report.stopped}")
    return found


# Over RPC


def verify_methods(verifying: LocalVerifying) -> list[Method]:
    """The verbs for a `Dispatcher`."""
    return [
        Method(
            name="Sectorfs.NodeVerify",
            permission="admin",
            params=(VerifyOrder,),
            handler=verifying.verify,
            waits=True,
        ),
        Method(name="Sectorfs.NodeVerifying", permission="read", handler=verifying.verifying),
    ]


class Call(Protocol):
    """Asks a method of a running node."""

    async def __call__(
        self, method: str, *params: object, result: type[T], patience: float = 0.0
    ) -> T:
        """The result, or the error the node answered with."""


class VerifyingClient:
    """The verbs of `Verifying`, asked of a running node."""

    def __init__(self, call: Call) -> None:
        self._call = call

    async def verify(self, order: VerifyOrder) -> VerifyReport:
        """See `Verifying.verify`."""
        return await self._call(
            "Sectorfs.NodeVerify", order, result=VerifyReport, patience=VERIFY_PATIENCE
        )

    async def verifying(self) -> list[VerifyingReport]:
        """See `Verifying.verifying`."""
        return await self._call("Sectorfs.NodeVerifying", result=list[VerifyingReport])
