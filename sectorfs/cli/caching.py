"""`sectorfs sector fetch|evict|pin|unpin`: the copies that a node keeps of others' files."""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import click
import msgspec
import trio
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from sectorfs.cli import output
from sectorfs.cli.context import Settings, common, with_admin
from sectorfs.cli.sectors import TypeName, files_of, parse_name
from sectorfs.errors import NotFound, SectorFSError, Unreachable
from sectorfs.node.admin import Admin
from sectorfs.node.caching import EvictedReport, FetchedReport, PinnedReport
from sectorfs.types import FileType, SectorFile

INTERVAL = 0.25
"""Seconds between two looks at the fetches under way."""
AT_A_TIME = 4
"""Fetches asked for at a time; each brings several ranges of its file at a time."""


class Outcome(msgspec.Struct, kw_only=True):
    """What became of one fetch, as scripts see it."""

    file_type: str
    sector: str
    how: str
    """``fetched``, ``was here``, or ``failed``."""
    size: int = 0
    seconds: float = 0.0
    state: str | None = None
    error: str | None = None
    thing: str | None = None
    hint: str | None = None

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.file_type}/{self.sector}"


Say = Callable[[Outcome], object]

names = click.argument("names", metavar="SECTOR…", nargs=-1, required=True)
type_option = click.option("--type", "file_type", type=TypeName(), help="Only this file.")


@click.command()
@names
@type_option
@common
def fetch(settings: Settings, names: tuple[str, ...], file_type: FileType | None) -> int:
    """Make whole copies of sector files on this node, several at a time.

    Ctrl-C ends it, and so does the end of the node; what came stays, and the same command goes on
    from there.

    Example: sectorfs sector fetch s-t01000-7 s-t01000-8 --type sealed
    """
    say: Say = (lambda outcome: None) if settings.as_json else _say
    try:
        found = with_admin(settings, lambda admin: _fetch_all(admin, names, file_type, say))
    except KeyboardInterrupt:
        click.echo("stopped; what came stays, and the same command goes on from there", err=True)
        return 130
    if settings.as_json:
        output.print_json(found)
    return 1 if any(one.error for one in found) else 0


async def _fetch_all(
    admin: Admin, names: Sequence[str], file_type: FileType | None, say: Say
) -> list[Outcome]:
    files = await _all_files(admin, names, file_type)
    if len(files) == 1:
        async with _shown(admin, files):
            outcome = await _fetch(admin, files[0])
        say(outcome)
        return [outcome]
    outcomes: dict[SectorFile, Outcome] = {}
    places = trio.CapacityLimiter(AT_A_TIME)

    async def one(file: SectorFile) -> None:
        async with places:
            try:
                outcome = await _fetch(admin, file)
            except SectorFSError as exc:
                outcome = _failed(file, exc)
        outcomes[file] = outcome
        say(outcome)

    async with _shown(admin, files), trio.open_nursery() as nursery:
        for file in files:
            nursery.start_soon(one, file)
    return [outcomes[file] for file in files]


async def _fetch(admin: Admin, file: SectorFile) -> Outcome:
    began = time.monotonic()
    report: FetchedReport = await admin.caching.fetch(file)
    return Outcome(
        file_type=report.file_type,
        sector=report.sector,
        how=report.how,
        size=report.size,
        seconds=time.monotonic() - began,
        state=report.state,
    )


def _failed(file: SectorFile, exc: SectorFSError) -> Outcome:
    return Outcome(
        file_type=file.file_type.dir_name,
        sector=file.sector.name,
        how="failed",
        error=exc.what,
        thing=exc.thing,
        hint=exc.hint,
    )


def _say(outcome: Outcome) -> None:
    if outcome.error is not None:
        why = f"{outcome.error} ({outcome.hint})" if outcome.hint else outcome.error
        click.echo(f"sectorfs: {outcome.name}: {output.printable(why)}", err=True)
    elif outcome.how == "was here":
        click.echo(f"{outcome.name} was here ({outcome.state}), {output.size(outcome.size)}")
    else:
        rate = output.size(int(outcome.size / max(outcome.seconds, 1e-3)))
        took = f"in {outcome.seconds:.1f} s, {rate}/s"
        click.echo(f"{outcome.name} fetched, {output.size(outcome.size)} {took}")


@asynccontextmanager
async def _shown(admin: Admin, files: Sequence[SectorFile]) -> AsyncIterator[None]:
    """Bars on the terminal while files come; nothing where either output goes elsewhere."""
    if not (sys.stdout.isatty() and sys.stderr.isatty()):
        yield
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True) as progress:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_follow, admin, progress, {str(file) for file in files})
            yield
            nursery.cancel_scope.cancel()


async def _follow(admin: Admin, progress: Progress, wanted: set[str]) -> None:
    """Show the fetches under way that are ours."""
    bars: dict[str, TaskID] = {}
    while True:
        try:
            coming = await admin.caching.coming()
        except SectorFSError:
            return  # the fetch itself meets the same error and reports it
        now = {f"{one.file_type}/{one.sector}": one for one in coming}
        for name in bars.keys() - now.keys():
            progress.remove_task(bars.pop(name))
        for name, one in now.items():
            if name not in wanted:
                continue
            if name not in bars:
                bars[name] = progress.add_task(name, total=one.size, completed=one.done)
            progress.update(bars[name], total=one.size or None, completed=one.done)
        await trio.sleep(INTERVAL)


@click.command()
@names
@type_option
@common
def evict(settings: Settings, names: tuple[str, ...], file_type: FileType | None) -> None:
    """Remove this node's copies of sector files, and what came of unfinished ones.

    A copy that is pinned, open, or has no healthy primary copy elsewhere stays.

    Example: sectorfs sector evict s-t01000-7
    """

    async def work(admin: Admin, file: SectorFile) -> EvictedReport:
        return await admin.caching.evict(file)

    def say(report: EvictedReport) -> str:
        return f"{report.file_type}/{report.sector} evicted, {output.size(report.freed)}"

    _each(settings, names, file_type, work, say, only_copies=True)


@click.command()
@names
@type_option
@common
def pin(settings: Settings, names: tuple[str, ...], file_type: FileType | None) -> None:
    """Keep this node's copies of sector files, whatever room is needed; also those yet to come.

    Example: sectorfs sector pin s-t01000-7 --type unsealed
    """
    _each(settings, names, file_type, _pinning(pinned=True), _say_pinned)


@click.command()
@names
@type_option
@common
def unpin(settings: Settings, names: tuple[str, ...], file_type: FileType | None) -> None:
    """Let copies go again when room is needed.

    Example: sectorfs sector unpin s-t01000-7 --type unsealed
    """
    _each(settings, names, file_type, _pinning(pinned=False), _say_pinned)


Work = Callable[[Admin, SectorFile], Awaitable[msgspec.Struct]]


def _pinning(*, pinned: bool) -> Work:
    async def work(admin: Admin, file: SectorFile) -> PinnedReport:
        return await admin.caching.pin(file, pinned=pinned)

    return work


def _say_pinned(report: PinnedReport) -> str:
    word = "pinned" if report.pinned else "not pinned any more"
    if not report.changed:
        word = "was pinned already" if report.pinned else "was not pinned"
    kept = report.pinned and report.state not in ("cached", "local", "shared")
    later = "; `sectorfs sector fetch` brings it here" if kept else ""
    return f"{report.file_type}/{report.sector} {word}{later}"


def _each(
    settings: Settings,
    names: Sequence[str],
    file_type: FileType | None,
    work: Work,
    say: Callable[[Any], str],
    *,
    only_copies: bool = False,
) -> None:
    """Do `work` on each file; what was done is printed, then the first failure raised.

    `only_copies`: a sector's files of which nothing is here are passed over, unless named.
    """

    async def run(admin: Admin) -> tuple[list[msgspec.Struct], list[SectorFSError]]:
        done: list[msgspec.Struct] = []
        failures: list[SectorFSError] = []
        absent: list[SectorFSError] = []
        for file in await _all_files(admin, names, file_type):
            try:
                done.append(await work(admin, file))
            except SectorFSError as exc:
                if isinstance(exc, Unreachable):
                    raise
                usual = only_copies and isinstance(exc, NotFound)
                (absent if usual else failures).append(exc)
        return done, failures if done or failures else absent[:1]

    done, failures = with_admin(settings, run)
    if settings.as_json:
        output.print_json(done)
    else:
        for one in done:
            click.echo(say(one))
    for failure in failures[1:]:
        output.print_error(failure, as_json=settings.as_json)
    if failures:
        raise failures[0]


async def _all_files(
    admin: Admin, names: Sequence[str], file_type: FileType | None
) -> list[SectorFile]:
    """The files that are named; of sectors without a type all that are declared."""
    parsed = [parse_name(name, file_type) for name in names]
    found: list[SectorFile] = []
    for wanted, chosen in parsed:
        found += await files_of(admin, wanted, chosen, None)
    return list(dict.fromkeys(found))
