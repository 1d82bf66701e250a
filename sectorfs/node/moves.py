"""Moving and removing sector files across the cluster, from whichever node is asked.

A move is done by the node of its destination, a removal by the node of each copy: `LocalMoves`
does what lies here and asks others for the rest, `MovesClient` asks a running node.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol, TypeVar

import msgspec

from sectorfs.config import Config
from sectorfs.errors import (
    BadInput,
    DiskError,
    NotFound,
    Refused,
    SectorFSError,
    StorageUnavailable,
    Unreachable,
)
from sectorfs.index import draining
from sectorfs.index.protocol import Declaration, SectorIndex
from sectorfs.stores.local import LocalStore
from sectorfs.stores.moving import Moved, Mover
from sectorfs.stores.removal import Remover
from sectorfs.stores.space_ledger import SpaceLedger
from sectorfs.stores.transfer import PeerClient
from sectorfs.stores.turns import Turns
from sectorfs.types import (
    SectorFile,
    StorageID,
    parse_file_type,
    parse_sector,
    parse_storage_id,
)
from sectorfs.wire import jsonrpc
from sectorfs.wire.client import Client
from sectorfs.wire.jsonrpc import Method

T = TypeVar("T")

Ask = Callable[[str, bytes, float], Awaitable[tuple[int, bytes]]]
"""POST a body to a URL, waiting so many seconds longer than usual: status and body."""

MOVE_PATIENCE = 7 * 86400.0
"""Seconds a move may take: a sector being sealed has 450 GiB, and networks may be slow."""
REMOVE_PATIENCE = 3600.0
PAGE = 1000
TRIES = 3
"""Storages that a move without a destination tries."""
ANSWER_LIMIT = 256 << 20
"""Bytes of one answer: the list of a million files."""


class MoveReport(msgspec.Struct, kw_only=True):
    """A move that is done."""

    file_type: str
    sector: str
    source: str | None
    to: str
    size: int
    how: str


class RemoveReport(msgspec.Struct, kw_only=True):
    """A removal that is done."""

    file_type: str
    sector: str
    storages: list[str]


class HeldReport(msgspec.Struct, kw_only=True):
    """A sector file that a storage declares."""

    file_type: str
    sector: str
    size: int | None


class MovingReport(msgspec.Struct, kw_only=True):
    """A move under way on a node."""

    file_type: str
    sector: str
    to: str
    done: int
    size: int


class Moves(Protocol):
    """Verbs on sector files."""

    async def move(
        self, file: SectorFile, *, to: StorageID | None, source: StorageID | None
    ) -> MoveReport:
        """Move a file to a storage, or to the best one."""

    async def remove(
        self, file: SectorFile, *, force: bool, copies: bool, storage: StorageID | None
    ) -> RemoveReport:
        """Remove a file from every storage, from one, or only what is not primary."""

    async def held(self, storage: StorageID) -> list[HeldReport]:
        """What a storage declares."""

    async def moving(self) -> list[MovingReport]:
        """Moves under way on the node that is asked."""


class LocalMoves:
    """The verbs, done here as far as they concern paths of this node."""

    def __init__(
        self,
        *,
        index: SectorIndex,
        local: LocalStore,
        peers: PeerClient,
        ask: Ask,
        space: SpaceLedger,
        owner: str,
        own_urls: frozenset[str],
        config: Config,
    ) -> None:
        self._index = index
        self._local = local
        self._peers = peers
        self._ask = ask
        self._own_urls = own_urls
        self._cutoff = config.index.cutoff
        turns = self.turns = Turns()
        """One change of a sector file at a time."""
        self.remover = Remover(
            index=index,
            local=local,
            peers=peers,
            turns=turns,
            owner=owner,
            own_urls=own_urls,
            cutoff=config.index.cutoff,
            deadline=config.timeouts.disk,
        )
        self.mover = Mover(
            index=index,
            local=local,
            peers=peers,
            space=space,
            remover=self.remover,
            turns=turns,
            owner=owner,
            own_urls=own_urls,
            deadline=config.timeouts.disk,
        )

    async def move(
        self, file: SectorFile, *, to: StorageID | None, source: StorageID | None
    ) -> MoveReport:
        """See `Moves.move`."""
        if to is not None:
            return await self._move_to(file, to, source)
        if source is None:
            raise BadInput("neither where to nor where from", file)
        failure: SectorFSError | None = None
        for target in (await self._targets(file, source))[:TRIES]:
            try:
                return await self._move_to(file, target, source)
            except (DiskError, StorageUnavailable) as exc:
                failure = failure or exc
        raise failure or Refused(
            "no healthy storage may take it and has room", file, "see `sectorfs storage list`"
        )

    async def _targets(self, file: SectorFile, source: StorageID) -> list[StorageID]:
        held = await self._held(file)
        known = held.get(source)
        size = known.facts.size if known is not None and known.facts is not None else 0
        return draining.targets(
            file,
            size,
            held,
            await self._index.storages(),
            source=source,
            cutoff=self._cutoff,
        )

    async def _move_to(
        self, file: SectorFile, to: StorageID, source: StorageID | None
    ) -> MoveReport:
        if self._local.path_of(to) is not None:
            return _move_report(await self.mover.move(file, to, source=source))
        causes: list[SectorFSError] = []
        for url in await self._urls(to):
            client = MovesClient(_rpc_url(url), self._ask)
            try:
                return await client.move(file, to=to, source=source)
            except Unreachable as exc:
                causes.append(exc)
        raise causes[0] if causes else StorageUnavailable("no node serves it", to)

    async def _urls(self, storage: StorageID) -> list[str]:
        info = await self._index.info(storage)
        return [url for url in info.urls if url not in self._own_urls]

    async def _held(self, file: SectorFile) -> dict[StorageID, Declaration]:
        declarations = await self._index.sector(file.sector)
        return {item.storage: item for item in declarations if item.file == file}

    async def remove(
        self, file: SectorFile, *, force: bool, copies: bool, storage: StorageID | None
    ) -> RemoveReport:
        """See `Moves.remove`. Copies go first, so that a failure leaves the primary ones."""
        held = await self._held(file)
        if not held or (storage is not None and storage not in held):
            raise NotFound("no storage declares it" if not held else f"not on {storage}", file)
        victims = sorted(held, key=lambda one: (held[one].primary, one))
        if storage is not None:
            victims = [storage]
        if copies:
            victims = [one for one in victims if not held[one].primary]
            force = False
            if len(victims) == len(held):
                victims = []  # without a primary copy the copies are all there is
        elif not force:
            await self._require_primary(file, held, victims)
        for victim in victims:
            await self._remove_from(file, victim, held, force=force)
        return RemoveReport(
            file_type=file.file_type.dir_name, sector=file.sector.name, storages=list(victims)
        )

    async def _require_primary(
        self, file: SectorFile, held: Mapping[StorageID, Declaration], victims: list[StorageID]
    ) -> None:
        """Before the first copy goes: each node asks again for its own."""
        left = {one for one, item in held.items() if item.primary} - set(victims)
        statuses = await self._index.storages()
        if not any(one.healthy(self._cutoff) and one.info.storage in left for one in statuses):
            raise Refused(
                "no healthy primary copy would remain",
                file,
                "--copies removes only what is not primary, --force everything",
            )

    async def _remove_from(
        self,
        file: SectorFile,
        victim: StorageID,
        held: Mapping[StorageID, Declaration],
        *,
        force: bool,
    ) -> None:
        if self._local.path_of(victim) is not None:
            await self.remover.remove(file, only=[victim], force=force)
            return
        causes: list[SectorFSError] = []
        for url in await self._urls(victim):
            try:
                await self._peers.remove(url, file, keep=sorted(set(held) - {victim}), force=force)
                return
            except Unreachable as exc:
                causes.append(exc)
        raise causes[0] if causes else StorageUnavailable("no node serves it", victim)

    async def held(self, storage: StorageID) -> list[HeldReport]:
        """See `Moves.held`; `NotFound` for a storage nobody knows."""
        await self._index.info(storage)
        found: list[HeldReport] = []
        after: SectorFile | None = None
        while True:
            page = await self._index.declarations(storage, after=after, limit=PAGE)
            found += [_held_report(item) for item in page]
            if len(page) < PAGE:
                return found
            after = page[-1].file

    async def moving(self) -> list[MovingReport]:
        """See `Moves.moving`."""
        return [
            MovingReport(
                file_type=one.file.file_type.dir_name,
                sector=one.file.sector.name,
                to=one.to,
                done=one.done,
                size=one.size,
            )
            for one in self.mover.moves()
        ]


def local_moves(
    *,
    index: SectorIndex,
    local: LocalStore,
    client: Client,
    space: SpaceLedger,
    owner: str,
    own_urls: frozenset[str],
    config: Config,
) -> LocalMoves:
    """The verbs over a node's parts."""

    async def ask(url: str, body: bytes, patience: float) -> tuple[int, bytes]:
        return await client.post(url, body, patience=patience, limit=ANSWER_LIMIT)

    return LocalMoves(
        index=index,
        local=local,
        peers=PeerClient(client),
        ask=ask,
        space=space,
        owner=owner,
        own_urls=own_urls,
        config=config,
    )


def _rpc_url(base_url: str) -> str:
    """``http://h:p/remote`` → ``http://h:p/rpc/v0``."""
    return base_url.partition("?")[0].rstrip("/").removesuffix("/remote") + "/rpc/v0"


def _move_report(moved: Moved) -> MoveReport:
    return MoveReport(
        file_type=moved.file.file_type.dir_name,
        sector=moved.file.sector.name,
        source=moved.source,
        to=moved.to,
        size=moved.size,
        how=moved.how,
    )


def _held_report(item: Declaration) -> HeldReport:
    return HeldReport(
        file_type=item.file.file_type.dir_name,
        sector=item.file.sector.name,
        size=item.facts.size if item.facts else None,
    )


# Over RPC


def move_methods(moves: LocalMoves) -> list[Method]:
    """The verbs for a `Dispatcher`."""

    async def move(file_type: str, sector: str, to: str | None, source: str | None) -> MoveReport:
        return await moves.move(_file(file_type, sector), to=_storage(to), source=_storage(source))

    async def remove(
        file_type: str, sector: str, force: bool, copies: bool, storage: str | None
    ) -> RemoveReport:
        return await moves.remove(
            _file(file_type, sector), force=force, copies=copies, storage=_storage(storage)
        )

    async def held(storage: str) -> list[HeldReport]:
        known = _storage(storage)
        assert known is not None
        return await moves.held(known)

    text = str | None
    handlers: tuple[tuple[str, str, tuple[object, ...], Callable[..., Awaitable[object]]], ...] = (
        ("Sectorfs.NodeMove", "admin", (str, str, text, text), move),
        ("Sectorfs.NodeRemove", "admin", (str, str, bool, bool, text), remove),
        ("Sectorfs.NodeHeld", "read", (str,), held),
        ("Sectorfs.NodeMoving", "read", (), moves.moving),
    )
    return [
        Method(name=name, permission=permission, params=params, handler=handler)
        for name, permission, params, handler in handlers
    ]


def _file(file_type: str, sector: str) -> SectorFile:
    try:
        return SectorFile(parse_file_type(file_type), parse_sector(sector))
    except ValueError as exc:
        raise BadInput(str(exc), f"{file_type}/{sector}"[:200]) from exc


def _storage(text: str | None) -> StorageID | None:
    if text is None:
        return None
    try:
        return parse_storage_id(text)
    except ValueError as exc:
        raise BadInput(str(exc), text[:200]) from exc


class MovesClient:
    """The verbs of `Moves`, asked of a running node."""

    def __init__(self, url: str, ask: Ask) -> None:
        self._url = url
        self._ask = ask
        self._last_id = 0

    async def move(
        self, file: SectorFile, *, to: StorageID | None, source: StorageID | None
    ) -> MoveReport:
        """See `Moves.move`."""
        return await self._call(
            "Sectorfs.NodeMove",
            *(file.file_type.dir_name, file.sector.name, to, source),
            result=MoveReport,
            patience=MOVE_PATIENCE,
        )

    async def remove(
        self, file: SectorFile, *, force: bool, copies: bool, storage: StorageID | None
    ) -> RemoveReport:
        """See `Moves.remove`."""
        return await self._call(
            "Sectorfs.NodeRemove",
            *(file.file_type.dir_name, file.sector.name, force, copies, storage),
            result=RemoveReport,
            patience=REMOVE_PATIENCE,
        )

    async def held(self, storage: StorageID) -> list[HeldReport]:
        """See `Moves.held`."""
        return await self._call("Sectorfs.NodeHeld", storage, result=list[HeldReport])

    async def moving(self) -> list[MovingReport]:
        """See `Moves.moving`."""
        return await self._call("Sectorfs.NodeMoving", result=list[MovingReport])

    async def _call(
        self, method: str, *params: object, result: type[T], patience: float = 60.0
    ) -> T:
        self._last_id += 1
        body = jsonrpc.encode_request(self._last_id, method, params)
        status, answer = await self._ask(self._url, body, patience)
        found: T = jsonrpc.decode_answer(
            status, answer, request_id=self._last_id, result=result, url=self._url
        )
        return found
