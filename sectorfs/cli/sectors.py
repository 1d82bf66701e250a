"""`sectorfs sector …`: move and remove files of a sector, wherever in the cluster they are."""

from __future__ import annotations

import click

from sectorfs.cli import output
from sectorfs.cli.context import Settings, common, with_admin
from sectorfs.errors import BadInput, NotFound
from sectorfs.node.admin import Admin
from sectorfs.node.moves import MoveReport, RemoveReport
from sectorfs.types import (
    FileType,
    SectorFile,
    SectorID,
    StorageID,
    parse_file_type,
    parse_sector,
)


class TypeName(click.ParamType[FileType]):
    """``sealed`` as a file type."""

    name = "type"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> FileType:
        """A type by its directory name."""
        if isinstance(value, FileType):
            return value
        try:
            return parse_file_type(str(value))
        except ValueError as exc:
            names = ", ".join(one.dir_name for one in FileType)
            self.fail(f"{exc}, write one of {names}", param, ctx)


@click.group()
@common
def sector(settings: Settings) -> None:
    """Files of sectors: fetch, keep, evict, move, remove, read pieces out of them."""


@sector.command()
@click.argument("name", metavar="SECTOR")
@click.option("--to", "target", metavar="STORAGE", required=True, help="Where to: an id or a path.")
@click.option("--from", "source", metavar="STORAGE", help="Where from, if it is on several.")
@click.option("--type", "file_type", type=TypeName(), help="Only this file.  [default: all]")
@common
def move(
    settings: Settings, name: str, target: str, source: str | None, file_type: FileType | None
) -> None:
    """Move the files of a sector to another storage, of this node or another.

    A move that was interrupted goes on when it is begun again; until the end the old copy stays.

    Example: sectorfs sector move s-t01000-7 --to /mnt/disk2
    """
    wanted, chosen = parse_name(name, file_type)

    async def work(admin: Admin) -> list[MoveReport]:
        to = await storage_named(admin, target)
        origin = await storage_named(admin, source) if source is not None else None
        return [
            await admin.moves.move(file, to=to, source=origin)
            for file in await files_of(admin, wanted, chosen, origin)
        ]

    found = with_admin(settings, work)
    if settings.as_json:
        output.print_json(found)
        return
    for one in found:
        click.echo(f"{one.file_type}/{one.sector} {_how(one)} {one.to}, {output.size(one.size)}")


def _how(report: MoveReport) -> str:
    if report.how == "was there":
        return "is on" if report.source is None else f"was on, and left {report.source} for,"
    return f"moved from {report.source} to"


@sector.command()
@click.argument("name", metavar="SECTOR")
@click.option("--type", "file_type", type=TypeName(), help="Only this file.  [default: all]")
@click.option("--from", "source", metavar="STORAGE", help="Only from here: an id or a path.")
@click.option("--copies", is_flag=True, help="Only copies that are not primary.")
@click.option("--force", is_flag=True, help="The last primary copy too: it is gone for good.")
@common
def rm(
    settings: Settings,
    name: str,
    file_type: FileType | None,
    source: str | None,
    copies: bool,
    force: bool,
) -> None:
    """Remove the files of a sector from every storage of the cluster.

    The last primary copy is never removed without --force.

    Example: sectorfs sector rm s-t01000-7 --type unsealed --force
    """
    if copies and force:
        raise BadInput("--copies and --force exclude each other", name)
    wanted, chosen = parse_name(name, file_type)

    async def work(admin: Admin) -> list[RemoveReport]:
        storage = await storage_named(admin, source) if source is not None else None
        return [
            await admin.moves.remove(file, force=force, copies=copies, storage=storage)
            for file in await files_of(admin, wanted, chosen, storage)
        ]

    found = with_admin(settings, work)
    if settings.as_json:
        output.print_json(found)
        return
    for one in found:
        where = ", ".join(one.storages) or "nowhere"
        click.echo(f"{one.file_type}/{one.sector} removed from {where}")


def parse_name(text: str, file_type: FileType | None) -> tuple[SectorID, FileType | None]:
    """``s-t01000-7``, or a path that ends in ``sealed/s-t01000-7``."""
    *folders, name = text.rstrip("/").split("/")
    try:
        wanted = parse_sector(name)
        if not folders:
            return wanted, file_type
        named = parse_file_type(folders[-1])
    except ValueError as exc:
        raise BadInput(str(exc), text, "write for example s-t01000-7") from exc
    if file_type is not None and file_type is not named:
        raise BadInput(f"is not of type {file_type.dir_name}", text)
    return wanted, named


async def files_of(
    admin: Admin, wanted: SectorID, file_type: FileType | None, storage: StorageID | None
) -> list[SectorFile]:
    """The file that is named, or those that are declared (on one storage, if it is named)."""
    if file_type is not None:
        return [SectorFile(file_type, wanted)]
    found = [
        SectorFile(parse_file_type(one.file_type), wanted)
        for one in (await admin.find(wanted)).files
        if storage is None or any(copy.storage == storage for copy in one.locations)
    ]
    if not found:
        raise NotFound(f"no file of it is on storage {storage}", wanted)
    return found


async def storage_named(admin: Admin, text: str) -> StorageID:
    """A storage by its id, or by its path on this node."""
    storages = await admin.storages()
    named = text.rstrip("/") or text
    for one in storages:
        if text == one.storage or (one.path is not None and named == one.path.rstrip("/")):
            return StorageID(one.storage)
    raise NotFound("no such storage", text, "see `sectorfs storage list`")
