"""How results and errors are printed: tables for people, JSON for scripts, a line for an error."""

from __future__ import annotations

import sys
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.table import Table

from sectorfs.errors import SectorFSError
from sectorfs.node import reports

FILE_WIDTH = 200
"""Columns of a table that goes into a file or a pipe."""
UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def print_error(error: SectorFSError, *, as_json: bool) -> None:
    """One line (or one object) on stderr: what failed, on which thing, what to do."""
    if as_json:
        value = {"error": error.what, "thing": error.thing, "hint": error.hint}
        click.echo(msgspec.json.encode(value).decode(), err=True)
    else:
        text = " ".join(str(error).split())
        click.echo(text if text.startswith("sectorfs") else f"sectorfs: {text}", err=True)


def console() -> Console:
    """Standard output: as wide as the terminal, or wide enough for a file."""
    return Console(width=None if sys.stdout.isatty() else FILE_WIDTH)


def printable(text: str) -> str:
    """Without what would move the cursor: ids, URLs, owners, errors are told by other nodes."""
    return "".join(char if char.isprintable() else " " for char in text)


def size(count: int) -> str:
    """Bytes for people: ``1.5 TiB``."""
    value, unit = float(count), 0
    while value >= 1024 and unit < len(UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.0f} B" if unit == 0 else f"{value:.1f} {UNITS[unit]}"


def storage_table(storages: list[reports.StorageReport]) -> Table:
    """`storage list` for people."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("storage", "path or url", "use", "free", "files", "kind", "health"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "storage")
    for storage in storages:
        kind = [
            word
            for word, flag in (("seal", storage.can_seal), ("store", storage.can_store))
            if flag
        ]
        counts = " ".join(f"{name}:{count}" for name, count in storage.files.items())
        table.add_row(
            storage.storage,
            storage.path or _urls(storage) or "-",
            _use(storage),
            f"{size(storage.available)} of {size(storage.capacity)}",
            counts or "-",
            "+".join(kind) or "copies",
            "[green]ok[/]" if storage.healthy else f"[red]{_escape(storage.error or 'unknown')}[/]",
        )
    return table


def _urls(storage: reports.StorageReport) -> str:
    """Where it is reached, each place with the kind of node there unless it is one of ours."""
    kinds = {url: kind for url, kind in storage.nodes.items() if kind != "sectorfs"}
    return " ".join(f"{url} ({kinds[url]})" if url in kinds else url for url in storage.urls)


def _use(storage: reports.StorageReport) -> str:
    if not storage.capacity:
        return "-"
    percent = 100 * (storage.capacity - storage.fs_available) // storage.capacity
    return f"{percent} %"


def sector_table(sector: reports.SectorReport) -> Table:
    """`storage find` for people."""
    table = Table(box=None, pad_edge=False, header_style="bold", title=sector.sector)
    for heading in ("type", "size", "state", "storage", "copy", "where", "health"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "storage")
    for file in sector.files:
        for location in file.locations:
            table.add_row(
                file.file_type,
                "?" if file.size is None else size(file.size),
                file.state,
                location.storage,
                "primary" if location.primary else "copy",
                location.path or " ".join(location.urls) or "-",
                "[green]ok[/]" if location.healthy else "[red]unhealthy[/]",
            )
    return table


def print_status(out: Console, status: reports.StatusReport) -> None:
    """`status` for people."""
    mount = f"{status.mount.path} ({status.mount.mode})" if status.mount else "none"
    if status.mount is not None and status.mount.passthrough_reason is not None:
        mount += f", every read through the daemon: {status.mount.passthrough_reason}"
    away = "never seen" if status.index.age is None else f"away for {status.index.age:.0f} s"
    index = "connected" if status.index.connected else away
    rows = (
        ("node", f"{status.version}, process {status.pid}, repo {status.repo}"),
        ("api", status.api),
        ("mount", mount),
        ("index", f"{status.index.url}: {index}, change {status.index.seq}"),
        ("open files", _open_files(status.files)),
        ("hashing", hashing(status.hashing)),
    )
    for name, text in rows:
        out.print(f"[bold]{name:<11}[/]{_escape(text)}", highlight=False)
    out.print(storage_table(status.storages))
    for fetch in status.fetches:
        name = f"{fetch.file_type}/{fetch.sector}" + (f"/{fetch.member}" if fetch.member else "")
        share = fetch.done / fetch.size if fetch.size else 0.0
        out.print(f"fetching {name} from {_escape(fetch.source)} {bar(share)} {size(fetch.done)}")
    for scan in status.scans:
        out.print(f"scanning {_escape(scan.path)}: {scan.done} entries")
    for scrub in status.scrubs:
        out.print(f"scrub of {_escape(scrub.path)}: {_escape(_scrub(scrub))}", highlight=False)
    for run in status.verifying:
        share = run.done / run.size if run.size else 0.0
        left = f", {duration(int(run.left))} left" if run.left is not None else ""
        pace = f"{size(int(run.rate))}/s{left}"
        out.print(f"verifying {_escape(run.what)} {bar(share)} {pace}", highlight=False)
    for problem in status.problems:
        out.print(f"[red]{_escape(problem)}[/]", highlight=False)


def hashing(report: reports.HashReport) -> str:
    """One line on the manifests that are made."""
    if report.state == "stopped":
        return "paused; no node runs" if report.paused else "no node runs"
    state = "under way" if report.state == "hashing" else report.state
    if not report.left_files and not report.current:
        return f"{state}, nothing is left"
    left = f"{report.left_files} files, {size(report.left_bytes)} left"
    pace = f", {size(report.rate)}/s" if report.rate else ""
    ends = f", {duration(report.seconds_left)}" if report.seconds_left is not None else ""
    return f"{state}, {left}{pace}{ends}"


def duration(seconds: int) -> str:
    """Seconds for people: ``16 days``, ``3 h``, ``5 min``."""
    for length, unit in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def _scrub(report: reports.ScrubReport) -> str:
    """One line on the scrub of a storage path."""
    counts = ", ".join(f"{count} {state}" for state, count in report.states.items())
    words = [f"ended {report.ended} ({counts})"] if report.ended else ["none ended yet"]
    if report.begun:
        words.append(f"begun {report.begun}, {report.files} files, {size(report.bytes)} so far")
    return "; ".join(words)


def _open_files(files: reports.FilesReport) -> str:
    if not files.open:
        return "0"
    ways = {"past the daemon": files.passthrough, "through it": files.daemon}
    ways["streamed"] = files.stream
    shown = ", ".join(f"{count} {way}" for way, count in ways.items() if count)
    return f"{files.open} ({shown})"


def bar(share: float, width: int = 20) -> str:
    """A progress bar of characters with its percentage."""
    filled = round(width * min(max(share, 0.0), 1.0))
    return f"{'#' * filled}{'.' * (width - filled)} {share:.0%}"


def _escape(text: str) -> str:
    return text.replace("[", r"\[")
