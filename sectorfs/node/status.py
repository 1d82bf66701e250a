"""The parts of a running node, and what they are doing: `sectorfs status`."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence

import msgspec

from sectorfs import __version__
from sectorfs.config import Config
from sectorfs.errors import Unreachable
from sectorfs.fuse.handles import Handles
from sectorfs.fuse.operations import Mount, SectorOperations
from sectorfs.index.catalog import Catalog, FileChange
from sectorfs.index.content import facts_of
from sectorfs.index.feed import Feed
from sectorfs.node import reports
from sectorfs.node.admin import LocalAdmin
from sectorfs.node.hashing import hash_report
from sectorfs.node.repo import Repo
from sectorfs.node.verify import LocalVerifying, scrub_problems
from sectorfs.stores.cache import CacheKeeper
from sectorfs.stores.hasher import Hasher
from sectorfs.stores.local import LocalStore
from sectorfs.stores.remote import RemoteStore
from sectorfs.types import SectorFile, StorageID

log = logging.getLogger(__name__)

MANY_PROBLEMS = 20
"""Problems of one kind that are shown; `sectorfs hash status` has all."""


class Node:
    """The parts of a running node that its status shows."""

    def __init__(
        self,
        *,
        repo: Repo,
        config: Config,
        api: str,
        catalog: Catalog,
        feed: Feed,
        local: LocalStore,
        store: RemoteStore,
        keeper: CacheKeeper,
        verifying: LocalVerifying,
        admin: LocalAdmin,
        hasher: Hasher,
    ) -> None:
        self.repo = repo
        self.config = config
        self.api = api
        self.catalog = catalog
        self.feed = feed
        self.local = local
        self.store = store
        self.keeper = keeper
        self.verifying = verifying
        self.admin = admin
        self.hasher = hasher
        self.operations: SectorOperations | None = None
        self.mount: Mount | None = None

    @property
    def handles(self) -> Handles | None:
        """What the mount has open; None where there is none."""
        return self.operations.handles if self.operations is not None else None

    def on_change(self, changes: Sequence[FileChange]) -> None:
        """The catalog changed: tell the kernel, who hashes what is new, and who asks about it."""
        self.hasher.changed(changes)
        self.store.learner.noticed(changes)
        if self.operations is not None:
            self.operations.changed(changes)

    def repaired(self, file: SectorFile, member: str | None) -> None:
        """A file was repaired in place: whoever reads it next through the mount must see that."""
        entry = self.catalog.entry(file)
        facts = facts_of(entry.facts, member) if entry is not None else None
        if self.operations is not None and facts is not None:
            self.operations.repaired(file, member, facts)

    def check_mount(self) -> None:
        """`MountFailed` when the mount cannot be what the configuration requires."""
        if self.operations is not None:
            self.operations.check_passthrough()

    def lose(self, storage: StorageID) -> None:
        """A storage of this node was detached or fell silent: nobody gets its open files."""
        if self.operations is not None:
            self.operations.handles.backing.lose(storage)

    async def status(self) -> reports.StatusReport:
        """What the node does now."""
        storages = await self._storages()
        problems = [f"storage {item.storage}: {item.error}" for item in storages if item.error]
        problems += [f"not attached: {why}" for why in self.local.waiting().values()]
        if not self.feed.connected:
            away = f"the Index at {self.config.index.url} does not answer"
            problems.append(self.remark or away)
        problems += self._waiting_with_their_disk()
        problems += self._wrong_bytes()
        if self.keeper.trouble:
            problems.append(f"the cache path: {self.keeper.trouble}")
        hashing = hash_report(self.hasher.status())
        problems += [f"hashing: {problem}" for problem in hashing.problems[:MANY_PROBLEMS]]
        scrubs = self.verifying.reports()
        problems += [problem for one in scrubs for problem in scrub_problems(one)]
        return reports.StatusReport(
            running=True,
            version=__version__,
            pid=os.getpid(),
            repo=str(self.repo.root),
            api=self.api,
            mount=self._mount_report(),
            index=reports.IndexReport(
                url=self.config.index.url,
                connected=self.feed.connected,
                seq=self.catalog.seq,
                age=self.feed.age if math.isfinite(self.feed.age) else None,
            ),
            storages=storages,
            files=self._files_report(),
            fetches=[
                reports.FetchReport(
                    sector=fetch.file.sector.name,
                    file_type=fetch.file.file_type.dir_name,
                    member=fetch.member,
                    done=fetch.done,
                    size=fetch.size,
                    source=fetch.source,
                )
                for fetch in self.store.fetches()
            ],
            scans=await self.admin.scans(),
            verifying=await self.verifying.verifying(),
            scrubs=scrubs,
            hashing=hashing,
            problems=problems,
        )

    def _mount_report(self) -> reports.MountReport | None:
        if self.mount is None or self.operations is None:
            return None
        reason = self.operations.passthrough
        return reports.MountReport(
            path=self.mount.path,
            mode="ro",
            passthrough="off" if reason else "on",
            passthrough_reason=reason or None,
        )

    def _files_report(self) -> reports.FilesReport:
        if self.operations is None:
            return reports.FilesReport(open=0, passthrough=0, daemon=0, stream=0)
        counts = self.operations.handles.counts()
        return reports.FilesReport(
            open=counts.passthrough + counts.daemon + counts.stream,
            passthrough=counts.passthrough,
            daemon=counts.daemon,
            stream=counts.stream,
            kept=counts.kept,
        )

    def _waiting_with_their_disk(self) -> list[str]:
        """Of what is read past the daemon on paths that do not answer, which no deadline ends."""
        passed = self.operations.handles.passed() if self.operations else {}
        return [
            f"{path.path}: {passed[path.storage]} files are open past the daemon; "
            "their readers wait for the disk, as on the bare disk"
            for path in self.local.paths()
            if not path.available and passed.get(path.storage)
        ]

    def _wrong_bytes(self) -> list[str]:
        """The sources that gave bytes which proved wrong."""
        bars = self.store.bars()
        problems = [f"{bar.file}: {bar.source.url} {bar}" for bar in bars[:MANY_PROBLEMS]]
        if len(bars) > MANY_PROBLEMS:
            problems.append(f"{len(bars) - MANY_PROBLEMS} more sources gave wrong bytes of files")
        return problems

    @property
    def remark(self) -> str:
        """What whoever started the node should know of its start; empty when all is well."""
        if math.isfinite(self.feed.age):
            return ""
        return (
            f"the Index at {self.config.index.url} has been away since this node's start: "
            "only its own files are shown"
        )

    async def _storages(self) -> list[reports.StorageReport]:
        """Of the Index, or of the catalog while the Index is away."""
        if self.feed.connected:
            try:
                return [self._as_seen_here(one) for one in await self.admin.storages()]
            except Unreachable:
                log.debug("status: the Index does not answer, showing the catalog")
        return [self._as_seen_here(one) for one in self.admin.storages_known()]

    def _as_seen_here(self, report: reports.StorageReport) -> reports.StorageReport:
        """Of this node's own paths it knows more than it last told the Index."""
        for path in self.local.paths():
            if path.storage == report.storage:
                error = path.health_error() or (report.error if self.feed.connected else None)
                return msgspec.structs.replace(report, healthy=error is None, error=error)
        return report
