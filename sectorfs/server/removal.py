"""``DELETE /remote/{type}/{sector}?keep=ID.ID``: take a sector file off this node's storage paths.

``keep`` names storages that stay untouched, as lotus and Curio send it: ids joined by dots, some of
which may be empty. The last healthy primary copy of the cluster stays as well (409), unless
``force=true``, and so does one that is being moved to this node.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Protocol

from sectorfs.errors import BadInput, NotFound
from sectorfs.stores.set_aside import Expected
from sectorfs.stores.transfer import EXPECT_HEADER, MOVED_HEADER
from sectorfs.types import (
    SectorFile,
    StorageID,
    parse_file_type,
    parse_sector,
    parse_storage_id,
)
from sectorfs.wire.messages import Reply, Request

_EXPECTED = re.compile(r"([0-9]{1,19})-(-?[0-9]{1,19})", re.ASCII)


class Removes(Protocol):
    """What the route needs of this node's `Remover`."""

    async def remove_for(
        self,
        file: SectorFile,
        *,
        keep: Collection[StorageID],
        force: bool,
        expected: Expected | None,
        moved_to: StorageID | None,
    ) -> list[StorageID]:
        """See `Remover.remove_for`."""


class RemovalRoute:
    """Answers for storage paths of this node."""

    def __init__(self, remover: Removes) -> None:
        self._remover = remover

    async def remove(self, request: Request) -> Reply:
        """200 once the file is gone from every path of this node that is not to be kept."""
        file = _file(request)
        await self._remover.remove_for(
            file,
            keep=_keep(request),
            force=_force(request),
            expected=_expected(request),
            moved_to=_moved_to(request),
        )
        return Reply(200)


def _file(request: Request) -> SectorFile:
    _, type_name, sector_name = request.segments
    try:
        return SectorFile(parse_file_type(type_name), parse_sector(sector_name))
    except ValueError as exc:
        raise NotFound(str(exc), request.path[:200]) from exc


def _keep(request: Request) -> frozenset[StorageID]:
    kept = set()
    for text in request.query.get("keep", ()):
        for name in filter(None, text.split(".")):
            try:
                kept.add(parse_storage_id(name))
            except ValueError as exc:
                raise BadInput(f"keep: {exc}", request.path, "write keep=ID.ID") from exc
    return frozenset(kept)


def _force(request: Request) -> bool:
    given = request.query.get("force", ["false"])
    if len(given) != 1 or given[0] not in ("true", "false"):
        raise BadInput("force must be true or false", request.path)
    return given[0] == "true"


def _expected(request: Request) -> Expected | None:
    text = request.headers.get(EXPECT_HEADER)
    if text is None:
        return None
    match = _EXPECTED.fullmatch(text)
    if match is None:
        raise BadInput(f"{EXPECT_HEADER} must be <size>-<mtime in ns>", request.path)
    return Expected(int(match[1]), int(match[2]))


def _moved_to(request: Request) -> StorageID | None:
    text = request.headers.get(MOVED_HEADER)
    if text is None:
        return None
    try:
        return parse_storage_id(text)
    except ValueError as exc:
        raise BadInput(f"{MOVED_HEADER}: {exc}", request.path) from exc
