"""`sectorfs storage drain`: move everything away from a storage, one file at a time.

The list of what is left is the Index's, so that a drain that was interrupted goes on when it is
begun again, and files that come meanwhile are moved as well.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import click
import msgspec
import trio
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from sectorfs.cli import output
from sectorfs.cli.context import Settings, common, with_admin
from sectorfs.cli.sectors import storage_named
from sectorfs.errors import SectorFSError, TimedOut, Unreachable
from sectorfs.node.admin import Admin
from sectorfs.node.moves import HeldReport
from sectorfs.types import SectorFile, StorageID, parse_file_type, parse_sector

INTERVAL = 0.25
"""Seconds between two looks at the move under way."""


class Failure(msgspec.Struct):
    """A file that could not be moved, and why."""

    file_type: str
    sector: str
    error: str
    thing: str
    hint: str


class DrainReport(msgspec.Struct):
    """What a drain came to."""

    storage: str
    moved: int = 0
    bytes: int = 0
    failed: list[Failure] = []


@click.command()
@click.argument("target", metavar="STORAGE")
@click.option("--to", "to", metavar="STORAGE", help="Where to.  [default: where there is room]")
@common
def drain(settings: Settings, target: str, to: str | None) -> int:
    """Move everything away from a storage, of this node or another.

    Exits with 1 when something could not be moved, and says why. A drain that was interrupted goes
    on when it is begun again.

    Example: sectorfs storage drain /mnt/disk1
    """
    report = with_admin(settings, lambda admin: _drain(admin, target, to))
    if settings.as_json:
        output.print_json(report)
    else:
        click.echo(f"moved {report.moved} files, {output.size(report.bytes)}")
        for one in report.failed:
            why = f"{one.error} ({one.hint})" if one.hint else one.error
            click.echo(f"{one.file_type}/{one.sector} stays: {why}", err=True)
    return 1 if report.failed else 0


async def _drain(admin: Admin, target: str, to: str | None) -> DrainReport:
    storage = await storage_named(admin, target)
    chosen = await storage_named(admin, to) if to is not None else None
    return await drain_storage(admin, storage, chosen)


async def drain_storage(admin: Admin, storage: StorageID, chosen: StorageID | None) -> DrainReport:
    """Move what a storage declares until nothing is left but what could not be moved."""
    report = DrainReport(storage)
    tried: set[tuple[str, str]] = set()
    while True:
        held = await admin.moves.held(storage)
        fresh = [one for one in held if (one.file_type, one.sector) not in tried]
        if not fresh:
            return report
        tried |= {(one.file_type, one.sector) for one in fresh}
        async with _shown(admin, fresh) as show:
            for one in fresh:
                await _move(admin, one, storage, chosen, report)
                show.done(one)


async def _move(
    admin: Admin, one: HeldReport, storage: StorageID, to: StorageID | None, report: DrainReport
) -> None:
    file = SectorFile(parse_file_type(one.file_type), parse_sector(one.sector))
    try:
        moved = await admin.moves.move(file, to=to, source=storage)
    except SectorFSError as exc:
        if isinstance(exc, Unreachable) and not isinstance(exc, TimedOut):
            await admin.moves.moving()  # the node itself is gone: say so, and not once per file
        report.failed.append(Failure(one.file_type, one.sector, exc.what, exc.thing, exc.hint))
    else:
        report.moved += 1
        report.bytes += moved.size


class _Show:
    """Progress of a drain by bytes."""

    def __init__(self, progress: Progress | None, files: list[HeldReport]) -> None:
        self._progress = progress
        self._done = 0
        self._left = len(files)
        if progress is not None:
            total = sum(one.size or 0 for one in files)
            self._task = progress.add_task(self._text(), total=total)

    def _text(self) -> str:
        return f"{self._left} files to move"

    def done(self, one: HeldReport) -> None:
        """A file was moved, or could not be."""
        self._left -= 1
        self._done += one.size or 0
        self.under_way(0)

    def under_way(self, size: int) -> None:
        """So many bytes of the next file have come."""
        if self._progress is not None:
            self._progress.update(self._task, completed=self._done + size, description=self._text())


@asynccontextmanager
async def _shown(admin: Admin, files: list[HeldReport]) -> AsyncIterator[_Show]:
    """A bar on the terminal while files are moved; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield _Show(None, files)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        show = _Show(progress, files)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_follow, admin, show)
            yield show
            nursery.cancel_scope.cancel()


async def _follow(admin: Admin, show: _Show) -> None:
    while True:
        try:
            show.under_way(sum(one.done for one in await admin.moves.moving()))
        except SectorFSError:
            return  # the move itself meets the same error and reports it
        await trio.sleep(INTERVAL)
