"""`sectorfs why`: where a file would be read from now, and why not from elsewhere."""

from __future__ import annotations

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sectorfs.cli import output
from sectorfs.cli.context import Settings, common, with_admin
from sectorfs.errors import BadInput
from sectorfs.node.why import WayReport, WhyReport
from sectorfs.types import SectorFile, parse_file_type, parse_member_name, parse_sector


@click.command()
@click.argument("path")
@common
def why(settings: Settings, path: str) -> None:
    """Where PATH would be read from now, and why not from elsewhere.

    PATH is one in the mount, or sealed/s-t01000-7. It is taken by its name: a mount that hangs
    does not matter.

    Example: sectorfs why /sectors/cache/s-t01000-7/p_aux
    """
    file, member = parse_path(path)
    report = with_admin(settings, lambda admin: admin.caching.why(file, member))
    if settings.as_json:
        output.print_json(report)
    else:
        print_why(output.console(), report)


def parse_path(text: str) -> tuple[SectorFile, str | None]:
    """``…/sealed/s-t01000-7`` or ``…/cache/s-t01000-7/p_aux``."""
    parts = [part for part in text.split("/") if part]
    for count in (2, 3):
        if len(parts) < count:
            break
        kind, name, *members = parts[-count:]
        try:
            file = SectorFile(parse_file_type(kind), parse_sector(name))
            return file, parse_member_name(members[0]) if members else None
        except ValueError:
            continue
    raise BadInput("names no sector file", text, "write for example sealed/s-t01000-7")


def print_why(out: Console, report: WhyReport) -> None:
    """For people: what is read, then every copy with a word on it."""
    name = "/".join(filter(None, (report.file_type, report.sector, report.member)))
    size = "size unknown" if report.size is None else output.size(report.size)
    marks = [report.state, size]
    if report.present is not None and report.size:
        marks.append(f"{report.present / report.size:.0%} of it here")
    if report.pinned:
        marks.append("pinned")
    out.print(f"[bold]{name}[/]: {', '.join(marks)}", highlight=False)
    if report.where is None:
        out.print("[red]it cannot be read now[/]", highlight=False)
    else:
        out.print(f"read from {_shown(report.where)}, {report.how}", highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("storage", "copy", "where", "node", "verdict", "last failure"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "copy")
    for way in report.sources:
        table.add_row(
            _shown(way.storage),
            "primary" if way.primary else "copy",
            _shown(way.where) or "-",
            way.node or "-",
            "[green]read[/]" if way.chosen else _shown(way.against),
            _failure(way),
        )
    out.print(table)


def _failure(way: WayReport) -> str:
    if way.failure is None or way.failed_ago is None:
        return "-"
    return f"{way.failed_ago:.0f} s ago: {_shown(way.failure)}"


def _shown(text: str) -> str:
    return escape(output.printable(text))
