"""`sectorfs sector verify`: whether every byte of this node's sector files is what it was."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import groupby

import click
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
from sectorfs.cli.sectors import TypeName, parse_name
from sectorfs.errors import BadInput, SectorFSError
from sectorfs.node.admin import Admin
from sectorfs.node.reports import VerifyingReport
from sectorfs.node.verify import VerifyOrder, VerifyReport
from sectorfs.stores.verdicts import WELL, Range, Told
from sectorfs.types import FileType

INTERVAL = 0.25
"""Seconds between two looks at the run under way."""
SHOWN = 5
"""Ranges of a file that are printed; all that are told are in the JSON."""


@click.command()
@click.argument("names", metavar="SECTOR…", nargs=-1)
@click.option("--storage", metavar="STORAGE", help="All files of a storage path: an id or a path.")
@click.option("--all", "every", is_flag=True, help="All files of this node.")
@click.option("--type", "file_type", type=TypeName(), help="Only files of this type.")
@click.option("--repair", is_flag=True, help="Replace damaged blocks by good ones from elsewhere.")
@click.option("--restart", is_flag=True, help="Begin from the start, not where the last one ended.")
@common
def verify(
    settings: Settings,
    names: tuple[str, ...],
    storage: str | None,
    every: bool,
    file_type: FileType | None,
    repair: bool,
    restart: bool,
) -> int:
    """Read sector files of this node from their disks, and compare every byte with what it was.

    Exits with 0 when all is well and 1 when something was found; deletes nothing. --repair writes
    to copies, and to primary ones only where both the sector and --type are named. Ctrl-C ends it;
    with --storage or --all, the same command goes on from there.

    Example: sectorfs sector verify s-t01000-7
    """
    _check(names, storage, every=every, restart=restart, file_type=file_type)
    try:
        report = with_admin(
            settings,
            lambda admin: _verify(admin, names, storage, file_type, repair=repair, anew=restart),
        )
    except KeyboardInterrupt:
        on = "" if names or file_type else "; the same command goes on from there"
        click.echo(f"stopped{on}", err=True)
        return 130
    if settings.as_json:
        output.print_json(report)
    else:
        _print(report)
    well = all(state in WELL for state in report.states)
    return 0 if well and not report.stopped else 1


def _check(
    names: Sequence[str],
    storage: str | None,
    *,
    every: bool,
    restart: bool,
    file_type: FileType | None,
) -> None:
    if every + (storage is not None or bool(names)) != 1:
        raise BadInput("name sectors, or --storage, or --all", "sector verify")
    if restart and (names or file_type):
        raise BadInput("--restart is for whole storages", "sector verify")


async def _verify(
    admin: Admin,
    names: Sequence[str],
    storage: str | None,
    file_type: FileType | None,
    *,
    repair: bool,
    anew: bool,
) -> VerifyReport:
    parsed = [parse_name(name, file_type) for name in names]
    order = VerifyOrder(
        files=[(kind.dir_name if kind else "", sector.name) for sector, kind in parsed],
        whole=not names,
        storage=storage,
        file_type=file_type.dir_name if file_type is not None and not names else None,
        repair=repair,
        anew=anew,
    )
    async with _shown(admin):
        return await admin.verifying.verify(order)


def _print(report: VerifyReport) -> None:
    for _, group in groupby(
        report.findings, key=lambda one: (one.storage, one.file_type, one.sector)
    ):
        _print_file(list(group), report.paths)
    if report.more:
        click.echo(f"… and {report.more} more")
    for storage, why in report.stopped.items():
        click.echo(
            f"{report.paths.get(storage, storage)} is not verified to the end: {_clean(why)}",
            err=True,
        )
    rate = output.size(int(report.bytes / max(report.seconds, 1e-3)))
    counts = ", ".join(f"{count} {state}" for state, count in report.states.items()) or "nothing"
    files = f"{report.files} sector file{'' if report.files == 1 else 's'}"
    click.echo(
        f"verified {files}, {output.size(report.bytes)} "
        f"in {report.seconds:.1f} s, {rate}/s: {counts}"
    )


def _print_file(findings: Sequence[Told], paths: dict[str, str]) -> None:
    """One line for a sector file that is well, else one for each of its files that is not."""
    first = findings[0]
    where = paths.get(first.storage, first.storage)
    states = {one.state for one in findings}
    if len(states) == 1 and first.state in WELL:
        size = output.size(sum(one.size for one in findings))
        click.echo(f"{first.file_type}/{first.sector} {first.state}, {size}, on {where}")
        return
    for one in findings:
        if one.state not in WELL:
            click.echo(f"{one.name} {one.state}{_damage(one)}, on {where}")


def _damage(one: Told) -> str:
    words = []
    if one.ranges:
        count = f"{one.blocks} block{'s' if one.blocks > 1 else ''}"
        words.append(f"{count}: {_ranges(one.ranges)}")
    if one.detail:
        words.append(_clean(one.detail))
    if one.repaired:
        words.append("repaired")
    return "".join(f", {word}" for word in words)


def _ranges(ranges: Sequence[Range]) -> str:
    shown = " ".join(f"{start}-{end - 1}" for start, end in ranges[:SHOWN])
    return f"{shown} …" if len(ranges) > SHOWN else shown


def _clean(text: str) -> str:
    return output.printable(text)


@asynccontextmanager
async def _shown(admin: Admin) -> AsyncIterator[None]:
    """A bar per run on the terminal; nothing where either output goes elsewhere."""
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
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_follow, admin, progress)
            yield
            nursery.cancel_scope.cancel()


async def _follow(admin: Admin, progress: Progress) -> None:
    """Show every run under way: a pass of the schedule holds ours up, or is taken over by it."""
    bars: dict[str, TaskID] = {}
    while True:
        try:
            runs = await admin.verifying.verifying()
        except SectorFSError:
            return  # the run itself meets the same error and reports it
        for gone in bars.keys() - {run.what for run in runs}:
            progress.remove_task(bars.pop(gone))
        for run in runs:
            if run.what not in bars:
                bars[run.what] = progress.add_task("", total=run.size)
            progress.update(
                bars[run.what], total=run.size, completed=run.done, description=_description(run)
            )
        await trio.sleep(INTERVAL)


def _description(run: VerifyingReport) -> str:
    found = f", {run.found} not well" if run.found else ""
    return f"{run.file or run.what}{found}".replace("[", r"\[")
