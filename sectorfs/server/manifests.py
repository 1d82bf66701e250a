"""``/remote/{type}/{sector}/manifest[/{name}]``: what proves the sector files of this node.

Of a regular file, in a directory too, the encoded manifest, whole or ranges of it; of a directory
its roll. Only of the content that lies here now: of another there is none, and 404 says so.
"""

from __future__ import annotations

from collections.abc import Callable

from sectorfs.errors import NotFound
from sectorfs.server.files import member_name, sector_file, timely
from sectorfs.server.ranges import file_reply
from sectorfs.stores.manifest_store import Key, ManifestStore
from sectorfs.stores.protocol import LocalFiles
from sectorfs.stores.rolls import make_roll
from sectorfs.types import SectorFile
from sectorfs.wire.messages import Reply, Request

_JSON = ("content-type", "application/json")


class ManifestRoutes:
    """Answers out of this node's manifests; `missed` is told of files that have none yet."""

    def __init__(
        self,
        files: LocalFiles,
        manifests: ManifestStore,
        *,
        deadline: float,
        missed: Callable[[SectorFile], object],
    ) -> None:
        self._files = files
        self._manifests = manifests
        self._deadline = deadline
        self._missed = missed

    async def sector(self, request: Request) -> Reply:
        """``…/manifest``: the manifest of a file, or the roll of a directory."""
        file = sector_file(request)
        if file.file_type.is_directory:
            return await self._roll(file)
        return await self._manifest(request, file, None)

    async def member(self, request: Request) -> Reply:
        """``…/manifest/{name}``: the manifest of one file of a directory."""
        file = sector_file(request)
        return await self._manifest(request, file, member_name(request, file))

    async def _manifest(self, request: Request, file: SectorFile, member: str | None) -> Reply:
        key = await self._key(file, member)
        opened = await timely(self._manifests.open(key), file, self._deadline)
        if opened is None:
            raise self._none(file)
        try:
            return file_reply(request, opened)
        except BaseException:
            opened.close()
            raise

    async def _key(self, file: SectorFile, member: str | None) -> Key:
        """Which content lies here now."""
        found = await timely(self._files.excerpt(file, member, ()), file, self._deadline)
        return Key(found.storage, file, member, found.size, found.mtime_ns)

    async def _roll(self, file: SectorFile) -> Reply:
        opened = self._files.open_directory(file, only=None)
        directory = await timely(opened, file, self._deadline)
        members, storage = directory.members, directory.storage
        directory.close()
        keys = [Key(storage, file, one.name, one.size, one.mtime_ns) for one in members]
        digests = await timely(self._manifests.digests(keys), file, self._deadline)
        if not keys or not all(digests):
            raise self._none(file)
        roll = make_roll(
            [(one.name, one.size, found) for one, found in zip(members, digests, strict=True)]
        )
        return Reply(200, (_JSON,), roll.encode())

    def _none(self, file: SectorFile) -> NotFound:
        self._missed(file)
        return NotFound("there is no manifest of it yet", file)
