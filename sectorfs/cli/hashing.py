"""`sectorfs hash status|pause|resume`: the manifests that a node makes of its files."""

from __future__ import annotations

import click

from sectorfs.cli import output
from sectorfs.cli.context import Settings, common, with_admin
from sectorfs.node.reports import HashReport


@click.group("hash")
@common
def hashing(settings: Settings) -> None:
    """The hashing of this node's files, which proves their bytes to readers elsewhere."""


@hashing.command()
@common
def status(settings: Settings) -> None:
    """How far it is, how fast it goes and how long it takes.

    Example: sectorfs hash status
    """
    _show(settings, with_admin(settings, lambda admin: admin.hashing.report()))


@hashing.command()
@common
def pause(settings: Settings) -> None:
    """Hold it up until `resume`, over restarts of the node too.

    Example: sectorfs hash pause
    """
    _show(settings, with_admin(settings, lambda admin: admin.hashing.pause(paused=True)))


@hashing.command()
@common
def resume(settings: Settings) -> None:
    """Let it go on.

    Example: sectorfs hash resume
    """
    _show(settings, with_admin(settings, lambda admin: admin.hashing.pause(paused=False)))


def _show(settings: Settings, report: HashReport) -> None:
    if settings.as_json:
        output.print_json(report)
        return
    click.echo(f"hashing: {output.hashing(report)}")
    for one in report.current:
        name = f"{one.file_type}/{one.sector}" + (f"/{one.member}" if one.member else "")
        share = one.done / one.size if one.size else 0.0
        click.echo(f"{name} {output.bar(share)} {output.size(one.done)}")
    for problem in report.problems:
        click.echo(problem)
