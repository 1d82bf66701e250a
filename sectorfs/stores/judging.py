"""What the files of one sector file, all read, are worth: each by what is known of it.

A directory has one digest, its files have none in the Index. What each must hash to is told by the
*roll*: the manifests made here, when they add up to that digest, else what another holder gives.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from sectorfs.stores.expected import WHOLE
from sectorfs.stores.local_path import LocalPath
from sectorfs.stores.manifest import Outline, block_count, directory_digest
from sectorfs.stores.others import Others
from sectorfs.stores.rolls import Roll, make_roll
from sectorfs.stores.verdicts import WELL, Known, State, judge
from sectorfs.stores.whole_reads import FileRead, Meter, read_again
from sectorfs.types import SectorFile


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """On one regular file."""

    state: State
    detail: str = ""
    bad: tuple[int, ...] = ()
    """Blocks, as `Finding.bad`."""
    located: bool = True
    outline: Outline | None = None
    """What its blocks must be, where any is bad and that is known."""


class Case(msgspec.Struct, kw_only=True):
    """A sector file that was read, and what can be compared with."""

    path: LocalPath
    file: SectorFile
    reads: dict[str, FileRead]
    """By name; `WHOLE` alone for a regular sector file."""
    own: Mapping[str, Outline]
    """Of manifests made here before, by name."""
    known: Known
    """Of the sector file; without `own`."""
    kept: bool = True
    """There is a manifest of every file that was hashed for the first time."""

    @property
    def digest(self) -> bytes:
        """Of the sector file as it was read; empty unless all of it could be."""
        if not self.file.file_type.is_directory:
            return self.reads[WHOLE].digest
        files = [(name, read.size, read.digest) for name, read in self.reads.items()]
        return directory_digest(files) if all(digest for _, _, digest in files) else b""


class Judge:
    """Judges sector files."""

    def __init__(self, others: Others) -> None:
        self._others = others

    async def judge(self, case: Case, meter: Meter) -> dict[str, Verdict]:
        """A verdict on each file; on a directory as a whole under `WHOLE`, if there is one."""
        if not case.file.file_type.is_directory:
            known = msgspec.structs.replace(case.known, own=case.own.get(WHOLE))
            return {WHOLE: await self._verdict(case, WHOLE, known, meter)}
        wanted = case.known.wanted
        if case.digest and case.digest == wanted:
            found = {name: Verdict(state="ok") for name in case.reads}
        else:
            found = await self._by_roll(case, wanted, meter)
        digest = case.digest
        if digest and all(one.state in WELL for one in found.values()):
            whole = judge(digest, case.known)
            if whole.state == "damaged":  # no file of it is, by what was hashed here
                detail = "has the bytes hashed here, and the Index tells of others"
                found[WHOLE] = Verdict(state="changed", detail=detail)
            elif whole.state == "changed":
                found[WHOLE] = Verdict(state="changed", detail=whole.detail)
            elif whole.state == "ok":
                found = {name: Verdict(state="ok") for name in found}
        return found

    async def _by_roll(self, case: Case, wanted: bytes, meter: Meter) -> dict[str, Verdict]:
        roll = await self._roll(case, wanted) if wanted else None
        found = {}
        for name, read in list(case.reads.items()):
            entry = roll.entry(name) if roll is not None else None
            told = entry.digest if entry is not None and entry.size == read.size else b""
            own = case.own.get(name)
            verdict = await self._verdict(case, name, Known(told=told, own=own), meter)
            if verdict.state == "unproved" and wanted and roll is None:
                detail = "this, or another file never hashed here, is not what was declared"
                bad = tuple(range(block_count(read.size)))
                verdict = Verdict(state="damaged", detail=detail, bad=bad, located=False)
            found[name] = verdict
        return found

    async def _roll(self, case: Case, wanted: bytes) -> Roll | None:
        entries = [
            (name, read.size, case.own[name].digest)
            for name, read in case.reads.items()
            if name in case.own
        ]
        own = make_roll(entries)
        if len(entries) == len(case.reads) and own.digest == wanted:
            return own
        return await self._others.roll(case.file, wanted, without=case.path.storage)

    async def _verdict(self, case: Case, name: str, known: Known, meter: Meter) -> Verdict:
        read = case.reads[name]
        if not read.unreadable:
            found = judge(read.digest, known)
            if found.state != "damaged":
                return Verdict(state=found.state, detail=found.detail)
        outline = await self._outline(read, known)
        if outline is None:
            bad = read.unreadable or tuple(range(block_count(read.size)))
            return _bad(read, bad, located=bool(read.unreadable), outline=None)
        if not read.unreadable:
            read = case.reads[name] = await read_again(case.path, read, outline, meter)
        bad = read.wrong(outline)
        if bad:
            return _bad(read, bad, located=True, outline=outline)
        return Verdict(state="ok")

    async def _outline(self, read: FileRead, known: Known) -> Outline | None:
        wanted = known.wanted
        if not wanted:
            return None
        if known.own is not None and known.own.digest == wanted:
            return known.own
        return await self._others.outline(read.subject, read.size, wanted)


def _bad(
    read: FileRead, bad: tuple[int, ...], *, located: bool, outline: Outline | None
) -> Verdict:
    return Verdict(
        state="unreadable" if read.unreadable else "damaged",
        detail=read.trouble,
        bad=bad,
        located=located,
        outline=outline,
    )
