"""Looks at every byte of a sector file on a path of this node, and says what it found.

A file is read from its disk, hashed, and compared with the digest it was declared with, with the
manifest that was made of it here, and with the copy that has the say (`judging`); what it must
consist of is compared with the size of its sector (`expected`). What cannot be proved yet is hashed
on this occasion: its manifest is kept and its digest declared, so that the next look can tell.

Nothing but manifests and digests is written, and nothing is said of a file that changes meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from functools import partial

import msgspec
import trio

from sectorfs.errors import (
    DiskError,
    NotFound,
    PermissionRefused,
    SectorFSError,
    SourceFailed,
    Stale,
    StorageUnavailable,
)
from sectorfs.index.catalog import Catalog
from sectorfs.index.content import exact
from sectorfs.index.protocol import SectorIndex
from sectorfs.stores import trailer
from sectorfs.stores.digest_news import tell_digests
from sectorfs.stores.expected import WHOLE, Lack, lacks, sector_size_among
from sectorfs.stores.judging import Case, Judge, Verdict
from sectorfs.stores.lanes import Descriptor
from sectorfs.stores.local_path import LocalPath
from sectorfs.stores.manifest import Manifest, Outline
from sectorfs.stores.manifest_store import Key, ManifestStore
from sectorfs.stores.others import Others, Subject
from sectorfs.stores.regular import open_regular
from sectorfs.stores.scan import check_identity, file_facts
from sectorfs.stores.verdicts import WELL, Finding, Known, State, worst
from sectorfs.stores.whole_reads import Meter, read_whole
from sectorfs.types import Facts, FileType, MemberFacts, SectorFile

log = logging.getLogger(__name__)

SETTLE = 5.0
"""Seconds that a file which is not as it was declared may take to be declared anew."""
LOOK_AGAIN = 0.1

_MEANWHILE = "changed while it was read"
_FAILS = (DiskError, PermissionRefused, StorageUnavailable)


class Wanted(msgspec.Struct, frozen=True):
    """What a damaged file must be."""

    outline: Outline
    mtime_ns: int


class Examined(msgspec.Struct, frozen=True):
    """A sector file, looked at."""

    findings: tuple[Finding, ...]
    """One for each regular file, those that lack included; none for what is gone."""
    wanted: Mapping[str, Wanted] = {}
    """Of damaged files whose right hashes are known: by name, `WHOLE` for a regular one."""
    moving: bool = False
    """It is being written: nothing can be said of it now."""

    @property
    def state(self) -> State:
        """The worst of all."""
        return worst(one.state for one in self.findings)


class Examiner:
    """Looks at sector files on this node's paths."""

    def __init__(
        self, *, index: SectorIndex, catalog: Catalog, manifests: ManifestStore, others: Others
    ) -> None:
        self._index = index
        self._catalog = catalog
        self._manifests = manifests
        self._judge = Judge(others)

    async def examine(self, path: LocalPath, file: SectorFile, meter: Meter) -> Examined:
        """Look at one sector file; an error of its disk is a finding, too."""
        try:
            return await self._examine(path, file, meter)
        except NotFound as exc:
            return await self._absent(path, file, exc.what)
        except Stale:
            path.note(file)
            return Examined((_finding(path, file, "changed", detail=_MEANWHILE),), moving=True)
        except _FAILS as exc:
            return _unreadable(path, file, exc)

    async def _examine(self, path: LocalPath, file: SectorFile, meter: Meter) -> Examined:
        facts = await self._settled(path, file)
        if facts != self._declared(path, file):
            detail = "is not what was declared"
            return Examined((_finding(path, file, "changed", size=facts.size, detail=detail),))
        case = await self._read(path, file, facts, meter)
        if await _look(path, file) != facts:
            raise Stale(_MEANWHILE, path.name_of(file))
        found = await self._judge.judge(case, meter)
        if all(verdict.state in WELL for verdict in found.values()):
            await self._keep(case, facts)
            await self._forget_others(case)
        lacking = await self._lacking(path, file, facts)
        return Examined(_findings(case, found, lacking), _wanted(case, found))

    # --- what lies there ---

    def _declared(self, path: LocalPath, file: SectorFile) -> Facts | None:
        declared = self._catalog.declared(file, path.storage)
        return declared.bare if declared is not None else None

    async def _settled(self, path: LocalPath, file: SectorFile) -> Facts:
        """What lies there, once that is declared; or after all, when it is not."""
        facts = await _look(path, file)
        if facts == self._declared(path, file):
            return facts
        path.note(file)
        with trio.move_on_after(SETTLE):
            while facts != self._declared(path, file):
                await trio.sleep(LOOK_AGAIN)
                facts = await _look(path, file)
        return await _look(path, file)

    async def _absent(self, path: LocalPath, file: SectorFile, why: str) -> Examined:
        """Not there: nothing to tell of when the Index agrees, for what is removed is dropped."""
        path.note(file)
        try:
            check = partial(check_identity, path.path, path.storage)
            await path.lane.run(check, what=f"look at {path.path}")
        except _FAILS as exc:
            return _unreadable(path, file, exc)
        held = await self._index.sector(file.sector)
        if not any(one.file == file and one.storage == path.storage for one in held):
            return Examined(())
        return Examined((_finding(path, file, "incomplete", detail=f"is declared, and {why}"),))

    async def _read(self, path: LocalPath, file: SectorFile, facts: Facts, meter: Meter) -> Case:
        known = self._known(path, file)
        case = Case(path=path, file=file, reads={}, own={}, known=known)
        own: dict[str, Outline] = {}
        for part in _parts(facts):
            subject = Subject(file, part.name or None, path.storage)
            manifest = await self._manifest(_key(subject, part))
            if manifest is not None:
                own[part.name] = manifest.outline
            # Not where a digest is known: these bytes are not to pass for what was hashed before.
            keep = manifest is None and not (known.told or known.present)
            read = await read_whole(path, subject, meter, keep=keep)
            if (read.size, read.mtime_ns) != (part.size, part.mtime_ns):
                raise Stale(_MEANWHILE, path.name_of(file, subject.member))
            if read.manifest is not None:
                case.kept = await self._save(_key(subject, part), read.manifest) and case.kept
                read = msgspec.structs.replace(read, manifest=None)
            case.reads[part.name] = read
        case.own = own
        return case

    async def _manifest(self, key: Key) -> Manifest | None:
        try:
            return await self._manifests.load(key)
        except SectorFSError as exc:  # the repo's disk: no word on this file
            log.warning("%s: its manifest cannot be read: %s", key, exc)
            return None

    async def _save(self, key: Key, manifest: Manifest) -> bool:
        try:
            await self._manifests.save(key, manifest)
        except SectorFSError as exc:
            log.warning("%s: its manifest cannot be kept: %s", key, exc)
            return False
        return True

    def _known(self, path: LocalPath, file: SectorFile) -> Known:
        entry = self._catalog.entry(file)
        if entry is None or entry.facts is None:
            return Known()
        here = [one for one in entry.declarations if one.storage == path.storage]
        if not here or here[0].facts is None:
            return Known(present=entry.facts.digest)
        told, bare = here[0].facts.digest, here[0].facts.bare
        same = exact(msgspec.structs.replace(here[0], facts=bare), entry.facts)
        copied = same and not here[0].primary
        return Known(told=told, present=entry.facts.digest, copied=copied)

    async def _forget_others(self, case: Case) -> None:
        """Manifests of other bytes than are there, which are right, would only mislead."""
        stale = [
            _key(read.subject, MemberFacts(name, read.size, read.mtime_ns))
            for name, read in case.reads.items()
            if name in case.own and case.own[name].digest != read.digest
        ]
        if stale:
            log.warning("%s: its manifest was of other bytes, and is made anew", case.file)
            with suppress(SectorFSError):
                await self._manifests.remove(stale)

    async def _lacking(self, path: LocalPath, file: SectorFile, facts: Facts) -> list[Lack]:
        """What is not there, or cannot be as it is."""
        told = {file.file_type: facts}
        for file_type in FileType:
            entry = self._catalog.entry(SectorFile(file_type, file.sector))
            if entry is not None and entry.facts is not None:
                told[file_type] = entry.facts
        size = sector_size_among(told)
        settled = not path.info.can_seal
        sizes = {one.name: one.size for one in _parts(facts)}
        found = lacks(file.file_type, sizes, size, settled=settled)
        if found or size is None or file.file_type is not FileType.UNSEALED:
            return found
        trouble = await path.lane.run(
            partial(_trailer_trouble, path.name_of(file), size), what=f"read the trailer of {file}"
        )
        return [Lack(WHOLE, "damaged", trouble)] if trouble else []

    async def _keep(self, case: Case, facts: Facts) -> None:
        """Declare what a file was found to be, unless that is known."""
        if not case.digest or case.known.told or not case.kept:
            return
        proved = msgspec.structs.replace(facts, digest=case.digest)
        try:
            await tell_digests(self._index, case.path, [(case.file, proved)])
        except SectorFSError as exc:
            log.debug("%s: its digest is not declared: %s", case.file, exc)


def _parts(facts: Facts) -> tuple[MemberFacts, ...]:
    """The regular files of a sector file, by name."""
    if facts.members is not None:
        return facts.members
    return (MemberFacts(WHOLE, facts.size, facts.mtime_ns),)


async def _look(path: LocalPath, file: SectorFile) -> Facts:
    call = partial(file_facts, path.path, path.storage, file)
    return await path.lane.run(call, what=f"look at {file}")


def _key(subject: Subject, part: MemberFacts) -> Key:
    return Key(subject.storage, subject.file, subject.member, part.size, part.mtime_ns)


def _trailer_trouble(name: str, sector_size: int) -> str:
    """What is wrong with the end of an unsealed file; empty when nothing is. Blocks."""
    fd, _ = open_regular(name)
    descriptor = Descriptor(fd)
    try:
        trailer.PartialFile.open(descriptor, sector_size=sector_size, thing=name)
    except SourceFailed as exc:
        return exc.what
    finally:
        descriptor.close()
    return ""


def _unreadable(path: LocalPath, file: SectorFile, exc: SectorFSError) -> Examined:
    if isinstance(exc, StorageUnavailable) and type(exc) is not StorageUnavailable:
        path.fail(exc)  # it is not there any more; whether it hangs is the lane's to judge
    return Examined((_finding(path, file, "unreadable", detail=exc.what),))


def _finding(
    path: LocalPath, file: SectorFile, state: State, *, size: int = 0, detail: str = ""
) -> Finding:
    return Finding(file=file, storage=path.storage, state=state, size=size, detail=detail)


def _findings(case: Case, found: Mapping[str, Verdict], lacking: list[Lack]) -> tuple[Finding, ...]:
    """One for each file, with the worse of what its bytes and its length say."""
    lack = {one.name: one for one in lacking}
    findings = []
    for name in sorted(found.keys() | lack.keys()):
        verdict, other = found.get(name), lack.get(name)
        read = case.reads.get(name)
        states: list[State] = [one.state for one in (verdict, other) if one is not None]
        details = [one.detail for one in (verdict, other) if one is not None and one.detail]
        findings.append(
            Finding(
                file=case.file,
                storage=case.path.storage,
                member=name or None,
                state=worst(states),
                size=read.size if read is not None else 0,
                detail="; ".join(details),
                bad=verdict.bad if verdict is not None else (),
                located=verdict.located if verdict is not None else True,
            )
        )
    return tuple(findings)


def _wanted(case: Case, found: Mapping[str, Verdict]) -> dict[str, Wanted]:
    return {
        name: Wanted(verdict.outline, case.reads[name].mtime_ns)
        for name, verdict in found.items()
        if verdict.outline is not None
    }
