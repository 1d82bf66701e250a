"""`sectorfs sector piece`: bytes of a piece as its client stored them, on standard output."""

from __future__ import annotations

import errno
import logging
import os

import click

from sectorfs.cli.context import Settings, common, run_async
from sectorfs.errors import BadInput, from_os
from sectorfs.node import pieces
from sectorfs.types import MAX_NUMBER, SectorID, parse_sector

STDOUT = 1
COUNT = click.IntRange(0, MAX_NUMBER)


@click.command()
@click.argument("sector")
@click.option(
    "--offset", metavar="N", type=COUNT, required=True, help="First byte, counted without padding."
)
@click.option(
    "--size", metavar="N", type=COUNT, required=True, help="How many bytes, without padding."
)
@common
def piece(settings: Settings, sector: str, offset: int, size: int) -> None:
    """Write unpadded bytes of a sector's unsealed file to standard output.

    Bytes that are not unsealed anywhere are an error that names them, and nothing is written.

    Example: sectorfs sector piece s-t01000-7 --offset 0 --size 1016 > head
    """
    try:
        wanted = parse_sector(sector)
    except ValueError as exc:
        raise BadInput(str(exc), sector, "write for example s-t01000-7") from exc
    logging.basicConfig(level=logging.WARNING, format="sectorfs: %(message)s")
    run_async(_copy, settings, wanted, offset, size)


async def _copy(settings: Settings, sector: SectorID, offset: int, size: int) -> None:
    async with pieces.open_unsealed(settings.repo, sector) as reader:
        await reader.read(offset, offset + size, _write)


def _write(data: memoryview) -> None:
    """Write all of it. Waits on the loop, where nothing else goes on in this process."""
    try:
        while data:
            data = data[os.write(STDOUT, data) :]
    except OSError as exc:
        if exc.errno == errno.EPIPE:
            raise  # the reader has enough: click ends quietly
        raise from_os(exc, "cannot be written", "standard output") from exc
