"""Read a tar stream of a sector directory as it arrives, believing nothing.

`TarReader` does no I/O: feed it bytes, get events; say that the stream ended, get a verdict. It
takes regular files with flat, safe, unlike names, and no more of them and no larger than allowed.
Anything else is an error that names the member.

Old peers end a stream after the last byte of the last file, without padding or zero blocks. Such an
end cannot be told from a connection that broke between two files: it is reported, and the caller
decides. An end within a file or its headers is always an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from sectorfs.errors import BadInput, SectorFSError, SourceFailed, TooLarge
from sectorfs.stores import tar_blocks
from sectorfs.stores.members import MAX_MEMBERS
from sectorfs.stores.tar_blocks import BLOCK, Header
from sectorfs.types import MAX_NUMBER, MemberFacts, parse_member_name

_MAX_EXTENSION = 64 * 1024
_MAX_AFTER_END = 2**20  # tar fills its last record with zeros; 10 KiB is usual
_SECOND = 10**9
_TIME = re.compile(r"(-?)([0-9]{1,10})(?:\.([0-9]{1,32}))?", re.ASCII)
_SIZE = re.compile(r"[0-9]{1,19}", re.ASCII)
_KINDS = {
    "1": "a hard link",
    "2": "a symbolic link",
    "3": "a character device",
    "4": "a block device",
    "5": "a directory",
    "6": "a FIFO",
    "S": "a sparse file",
}


class MemberBegins(msgspec.Struct, frozen=True):
    """A file follows."""

    facts: MemberFacts


class MemberData(msgspec.Struct, frozen=True):
    """The next bytes of the file, never none: a view of what was fed, good until the next feed."""

    data: memoryview


class MemberEnds(msgspec.Struct, frozen=True):
    """The file has all its bytes."""

    facts: MemberFacts


Event = MemberBegins | MemberData | MemberEnds


class Ending(msgspec.Struct, frozen=True):
    """What came, once the stream is over."""

    members: tuple[MemberFacts, ...]
    """In the order they came."""
    unterminated: bool
    """True when the end of the archive was not marked: files may be missing."""


class TarReader:
    """The state of one stream. After an error every call raises it again."""

    def __init__(
        self, thing: object, *, max_total: int, allow: Mapping[str, int] | None = None
    ) -> None:
        """`max_total` bounds the sizes of all files; `allow` maps each known name to its cap."""
        self._thing = thing
        self._allow = allow
        self._max_total = max_total
        self._total = 0
        self._members: dict[str, MemberFacts] = {}
        self._failed: SectorFSError | None = None
        # Invariant: at most one of the next three is under way: content, padding, a block.
        self._current: MemberFacts | None = None
        self._left = 0
        self._padding = 0
        self._block = bytearray()
        # Extensions wait here for the header they belong to.
        self._extension: Header | None = None
        self._records: dict[str, str] | None = None
        self._long_name: str | None = None
        self._zero_blocks = 0
        self._after_end = 0

    def feed(self, data: bytes | bytearray | memoryview) -> list[Event]:
        """The events of the next bytes of the stream; `BadInput` for what is not accepted."""
        self._raise_again()
        events: list[Event] = []
        view = memoryview(data).cast("B")
        try:
            while view:
                view = view[self._take(view, events) :]
        except SectorFSError as exc:
            self._failed = exc
            raise
        return events

    def finish(self) -> Ending:
        """The stream is over: what came, or `SourceFailed` naming the file that is cut."""
        self._raise_again()
        if self._current is not None:
            raise SourceFailed(
                f"tar ends {self._left} bytes before the end of a file",
                self._about(self._current.name),
            )
        extended = self._extension or self._records is not None or self._long_name is not None
        if extended or any(self._block):
            raise SourceFailed("tar ends within a header", self._thing)
        return Ending(tuple(self._members.values()), self._zero_blocks < 2)

    def _raise_again(self) -> None:
        if self._failed is not None:
            raise self._failed

    def _take(self, view: memoryview, events: list[Event]) -> int:
        """Use up some of the bytes; returns how many."""
        if self._current is not None:
            return self._take_content(self._current, view, events)
        if self._padding:
            used = min(self._padding, len(view))
            self._padding -= used
            return used
        if self._zero_blocks == 2:
            return self._take_after_end(view)
        used = min(self._block_length() - len(self._block), len(view))
        self._block += view[:used]
        if len(self._block) == self._block_length():
            block = bytes(self._block)
            self._block.clear()
            self._take_block(block, events)
        return used

    def _take_content(self, current: MemberFacts, view: memoryview, events: list[Event]) -> int:
        used = min(self._left, len(view))
        events.append(MemberData(view[:used]))
        self._left -= used
        if self._left == 0:
            self._current = None
            events.append(MemberEnds(current))
        return used

    def _take_after_end(self, view: memoryview) -> int:
        self._after_end += len(view)
        if self._after_end > _MAX_AFTER_END:
            raise TooLarge("tar: too much after the end", self._thing)
        if any(view):
            raise BadInput("tar: more than zeros after the end", self._thing)
        return len(view)

    def _block_length(self) -> int:
        if self._extension is None:
            return BLOCK
        return self._extension.size + tar_blocks.pad_length(self._extension.size)

    def _take_block(self, block: bytes, events: list[Event]) -> None:
        if self._extension is not None:
            self._end_extension(self._extension, block)
        elif not any(block):
            if self._records is not None or self._long_name is not None:
                raise BadInput("tar: an extension that belongs to no file", self._thing)
            self._zero_blocks += 1
        elif self._zero_blocks:
            raise BadInput("tar: a header after a zero block", self._thing)
        else:
            self._take_header(self._parse(block), events)

    def _parse(self, block: bytes) -> Header:
        try:
            return tar_blocks.decode_header(block)
        except BadInput as exc:
            raise BadInput(exc.what, self._after(), exc.thing) from exc

    def _take_header(self, header: Header, events: list[Event]) -> None:
        if header.kind in (tar_blocks.PAX, tar_blocks.LONG_NAME):
            self._begin_extension(header)
        else:
            self._begin_member(header, events)

    def _begin_extension(self, header: Header) -> None:
        """At most one of each kind before a file: a stream of them alone must end."""
        known = self._records if header.kind == tar_blocks.PAX else self._long_name
        if known is not None:
            raise BadInput("tar: two extensions of one kind for a file", self._about(header.name))
        if not 0 < header.size <= _MAX_EXTENSION:
            what = f"tar: an extension of {header.size} bytes"
            raise TooLarge(what, self._about(header.name))
        self._extension = header

    def _end_extension(self, extension: Header, block: bytes) -> None:
        content = block[: extension.size]
        self._extension = None
        if extension.kind == tar_blocks.LONG_NAME:
            self._long_name = content.partition(b"\0")[0].decode("utf-8", "backslashreplace")
            return
        try:
            self._records = tar_blocks.decode_pax(content)
        except BadInput as exc:
            raise BadInput(exc.what, self._about(extension.name)) from exc

    def _begin_member(self, header: Header, events: list[Event]) -> None:
        facts = self._facts(header)
        self._records = self._long_name = None
        self._members[facts.name] = facts
        self._total += facts.size
        self._padding = tar_blocks.pad_length(facts.size)
        events.append(MemberBegins(facts))
        if facts.size:
            self._current, self._left = facts, facts.size
        else:
            events.append(MemberEnds(facts))

    def _facts(self, header: Header) -> MemberFacts:
        """The file that a header and its extensions describe, if it is acceptable."""
        records = self._records or {}
        name = records.get("path") or self._long_name or header.name
        about = self._about(name)
        if header.kind != tar_blocks.REGULAR:
            kind = _KINDS.get(header.kind, f"a member of kind {header.kind!r}")
            raise BadInput(f"tar: {kind}, not a regular file", about)
        if any(key.startswith("GNU.sparse.") for key in records):
            raise BadInput("tar: a sparse file, not a regular one", about)
        try:
            parse_member_name(name)
        except ValueError as exc:
            raise BadInput(f"tar: {exc}", about) from exc
        size = self._size(records.get("size"), header.size, about)
        self._check(name, size, about)
        return MemberFacts(name, size, _time_ns(records.get("mtime"), header.mtime, about))

    def _size(self, record: str | None, header: int, about: str) -> int:
        if record is not None and _SIZE.fullmatch(record) is None:
            raise BadInput("tar: a size that is no number", about, repr(record[:80]))
        size = header if record is None else int(record)
        if not 0 <= size <= MAX_NUMBER:
            raise BadInput(f"tar: a size of {size}", about)
        return size

    def _check(self, name: str, size: int, about: str) -> None:
        """Known, not yet seen, and within every cap."""
        if name in self._members:
            raise BadInput("tar: the same name twice", about)
        if len(self._members) >= MAX_MEMBERS:
            raise TooLarge(f"tar: more than {MAX_MEMBERS} files", about)
        if self._allow is not None:
            cap = self._allow.get(name)
            if cap is None:
                raise BadInput("tar: not a file of a sector directory", about)
            if size > cap:
                raise TooLarge(f"tar: {size} bytes, at most {cap} are accepted", about)
        if self._total + size > self._max_total:
            what = f"tar: files of more than {self._max_total} bytes together"
            raise TooLarge(what, about)

    def _about(self, name: str) -> str:
        return f"{self._thing}: member {name[:255]!r}"

    def _after(self) -> str:
        """Where a block without a readable name stands."""
        if not self._members:
            return f"{self._thing}: first member"
        return f"{self._thing}: after member {next(reversed(self._members))!r}"


def _time_ns(record: str | None, header: int, about: str) -> int:
    """Nanoseconds; what does not fit 64 bits is no time of a file."""
    time_ns = header * _SECOND
    if record is not None:
        match = _TIME.fullmatch(record)
        if match is None:
            raise BadInput("tar: a time that is no number", about, repr(record[:80]))
        sign, seconds, fraction = match.groups()
        time_ns = int(seconds) * _SECOND + int((fraction or "")[:9].ljust(9, "0"))
        time_ns = -time_ns if sign else time_ns
    if not -MAX_NUMBER <= time_ns <= MAX_NUMBER:
        raise BadInput("tar: a time beyond reason", about)
    return time_ns
