"""`sectorfs storage …`: the storage paths of this node, and what the cluster knows of all."""

from __future__ import annotations

import os
from pathlib import Path

import click

from sectorfs.cli import lock_view, output, storage_view
from sectorfs.cli.context import Location, Settings, common, with_admin
from sectorfs.cli.progress import shown
from sectorfs.errors import BadInput
from sectorfs.node.admin import PathSettings
from sectorfs.stores.path_changes import PathChanges
from sectorfs.types import parse_sector, parse_size


class Size(click.ParamType[int]):
    """``10TiB`` in bytes."""

    name = "size"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_size(str(value))
        except ValueError as exc:
            self.fail(str(exc), param, ctx)


class Names(click.ParamType[tuple[str, ...]]):
    """``A,B`` as a tuple."""

    name = "a,b"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(part.strip() for part in str(value).split(",") if part.strip())


@click.group()
@common
def storage(settings: Settings) -> None:
    """Storage paths: attach, detach, set, scan, list, find, locks."""


@storage.command()
@click.argument("path", type=Location())
@click.option("--init", is_flag=True, help="Make PATH a storage path first (sectorstore.json).")
@click.option("--seal", "can_seal", is_flag=True, default=None, help="Sealing may use it.")
@click.option(
    "--store", "can_store", is_flag=True, default=None, help="Finished sectors stay on it."
)
@click.option("--weight", type=click.IntRange(0, 2**63 - 1), help="Preference.  [default: 10]")
@click.option("--max-storage", type=Size(), help="Bytes that may be used, for example 10TiB.")
@click.option("--groups", type=Names(), help="Groups this path belongs to.")
@click.option("--allow-to", type=Names(), help="Groups that may fetch from it.")
@click.option("--allow-types", type=Names(), help="Only these file types may be placed here.")
@click.option("--deny-types", type=Names(), help="These file types are never placed here.")
@click.option(
    "--allow-miners", type=Names(), help="Only these miners' sectors, for example t01000."
)
@click.option("--deny-miners", type=Names(), help="Never these miners' sectors.")
@common
def attach(settings: Settings, path: Path, init: bool, **options: object) -> None:
    """Attach a directory of sector files to this node.

    Without --init nothing is written below PATH: it must have a sectorstore.json, as the paths of
    lotus and Curio have.

    Example: sectorfs storage attach /mnt/disk1 --init --store
    """
    given = {name: value for name, value in options.items() if value is not None}
    if given and not init:
        raise BadInput(
            "path settings need --init", path, "without it they are read from sectorstore.json"
        )
    if init and not (given.get("can_seal") or given.get("can_store")):
        raise BadInput("--init needs --seal, --store or both", path, "say what the path is for")
    chosen = PathSettings(**given) if init else None  # type: ignore[arg-type]  # click's own types
    target = os.path.abspath(os.path.expanduser(path))
    found = with_admin(settings, lambda admin: shown(admin, admin.attach(target, chosen)))
    if settings.as_json:
        output.print_json({"storage": found, "path": target})
    else:
        click.echo(f"attached {target} as storage {found}")


@storage.command()
@click.argument("target", metavar="PATH|UUID")
@click.option(
    "--force", is_flag=True, help="Detach another node's storage though it answers or is needed."
)
@common
def detach(settings: Settings, target: str, force: bool) -> None:
    """Detach a path of this node, or the storage of a dead node; files stay where they are.

    Another node's storage is refused while its node reports or answers, and when it has the last
    copy of something.

    Example: sectorfs storage detach /mnt/disk1
    """
    target = _target(target)
    report = with_admin(settings, lambda admin: admin.detach(target, force=force))
    if settings.as_json:
        output.print_json(report)
        return
    click.echo(f"detached {target}")
    if report.lost:
        files = "1 sector file has" if report.lost == 1 else f"{report.lost} sector files have"
        click.echo(f"{files} no other copy, of {_some(report.lost_sectors)}")


@storage.command("set")
@click.argument("target", metavar="STORAGE|PATH")
@click.option("--weight", type=click.IntRange(0, 2**63 - 1), help="Preference.")
@click.option("--seal/--no-seal", "can_seal", default=None, help="Sealing may use it, or not.")
@click.option(
    "--store/--no-store", "can_store", default=None, help="Finished sectors stay on it, or not."
)
@click.option("--max-storage", type=Size(), help="Bytes that may be used; 0 for no limit.")
@click.option("--groups", type=Names(), help="Groups this path belongs to.")
@click.option("--allow-to", type=Names(), help="Groups that may fetch from it.")
@click.option("--allow-types", type=Names(), help="Only these file types may be placed here.")
@click.option("--deny-types", type=Names(), help="These file types are never placed here.")
@click.option(
    "--allow-miners", type=Names(), help="Only these miners' sectors, for example t01000."
)
@click.option("--deny-miners", type=Names(), help="Never these miners' sectors.")
@common
def set_(settings: Settings, target: str, **options: object) -> None:
    """Change the settings of a storage path of this node; '' clears a list.

    sectorstore.json is rewritten, with what other programs keep in it, and the Index follows at
    once. With --no-seal and --no-store nothing new is placed there, and what is there stays
    readable: so a path is closed before it is drained.

    Example: sectorfs storage set /mnt/disk1 --weight 20 --deny-types unsealed,cache
    """
    given = {name: value for name, value in options.items() if value is not None}
    if not given:
        raise BadInput("nothing to change", target, "name a setting, for example --weight 5")
    changes = PathChanges(**given)  # type: ignore[arg-type]  # click's own types
    target = _target(target)
    report = with_admin(settings, lambda admin: shown(admin, admin.configure(target, changes)))
    if settings.as_json:
        output.print_json(report)
        return
    for name, change in report.changed.items():
        click.echo(f"{name}: {_shown(name, change.before)} → {_shown(name, change.after)}")
    if not report.changed:
        click.echo(f"{report.path} is set so already")
    for note in report.notes:
        click.echo(note)
    if report.declared:
        click.echo(f"declared {report.declared} files as primary")


def _shown(name: str, value: int | bool | list[str]) -> str:
    """A setting as people write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        if name == "max_storage":
            return output.size(value) if value else "no limit"
        return str(value)
    return ",".join(value) or "none"


def _some(names: list[str], count: int = 5) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


@storage.command()
@click.argument("target", metavar="[PATH|UUID]", required=False)
@click.option("--all", "everything", is_flag=True, help="Every path of this node.")
@click.option("--drop-missing", is_flag=True, help="Drop declarations whose files are gone.")
@common
def redeclare(settings: Settings, target: str | None, everything: bool, drop_missing: bool) -> None:
    """Scan a path again, or all of them, and tell the Index what changed.

    Example: sectorfs storage redeclare --all --drop-missing
    """
    if everything == (target is not None):
        raise BadInput("name one path, or --all", "storage redeclare")
    chosen = _target(target) if target is not None else None
    result = with_admin(
        settings,
        lambda admin: shown(admin, admin.redeclare(chosen, drop_missing=drop_missing)),
    )
    if settings.as_json:
        output.print_json(result)
    else:
        click.echo(f"declared {result.declared}, dropped {result.dropped}, odd {result.odd}")


@storage.command("list")
@common
def list_(settings: Settings) -> None:
    """Every storage of the cluster: use, files, health.

    Example: sectorfs storage list
    """
    found = with_admin(settings, lambda admin: admin.storages())
    if settings.as_json:
        output.print_json(found)
    else:
        storage_view.print_storages(output.console(), found)


@storage.command()
@click.argument("sector")
@common
def find(settings: Settings, sector: str) -> None:
    """Where the files of a sector are.

    Example: sectorfs storage find s-t01000-7
    """
    try:
        wanted = parse_sector(sector)
    except ValueError as exc:
        raise BadInput(str(exc), sector, "write for example s-t01000-7") from exc
    found = with_admin(settings, lambda admin: admin.find(wanted))
    if settings.as_json:
        output.print_json(found)
    else:
        output.console().print(output.sector_table(found))


@storage.command()
@common
def locks(settings: Settings) -> None:
    """Which sectors are locked, by whom and why, and who waits.

    A lock ends with its lease: one whose holder died is gone when its seconds are over.

    Example: sectorfs storage locks
    """
    found = with_admin(settings, lambda admin: admin.locks())
    if settings.as_json:
        output.print_json(found)
    else:
        lock_view.print_locks(output.console(), found)


def _target(text: str) -> str:
    """A path becomes absolute; anything without a slash that does not exist is a storage's id."""
    if "/" in text or os.path.exists(text):
        return os.path.abspath(os.path.expanduser(text))
    return text
