"""A sector file as one look found it: enough to tell later whether it is still the same. Blocks."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence

import msgspec

from sectorfs.errors import NotFound, Refused
from sectorfs.index.content import same_mtime
from sectorfs.types import Facts, MemberFacts, SectorFile, parse_member_name


class Part(msgspec.Struct, frozen=True, order=True):
    """One regular file: the sector file itself (with an empty name), or one of its directory."""

    name: str
    size: int
    mtime_ns: int
    inode: int


class Seen(msgspec.Struct, frozen=True):
    """What lay under the name of a sector file."""

    entry: tuple[int, int]
    """Device and inode of the entry itself, which may be a symbolic link."""
    is_link: bool
    mtime_ns: int
    """Of the file or directory."""
    parts: tuple[Part, ...]
    """By ascending name."""

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return sum(part.size for part in self.parts)

    def facts(self, file: SectorFile) -> Facts:
        """As they are declared: without names that no sector directory shows."""
        if not file.file_type.is_directory:
            return Facts(self.size, self.mtime_ns)
        members = tuple(
            MemberFacts(part.name, part.size, part.mtime_ns)
            for part in self.parts
            if _is_shown(part.name)
        )
        return Facts(sum(member.size for member in members), self.mtime_ns, members)

    def same_content(self, other: Seen) -> bool:
        """Equal names, sizes and times of all parts; a directory's own time does not count."""
        return _same(self.parts, other.parts, same_mtime)

    def holds(self, facts: Facts, *, rounded: bool = False) -> bool:
        """Whether this is the content that `facts` tell of; a tar tells times `rounded`."""
        wanted = facts.members
        if wanted is None:
            wanted = (MemberFacts("", facts.size, facts.mtime_ns),)
        return _same(self.parts, wanted, _nearly_same_mtime if rounded else same_mtime)


def _same(
    ours: Sequence[Part],
    theirs: Sequence[Part | MemberFacts],
    same_time: Callable[[int, int], bool],
) -> bool:
    return len(ours) == len(theirs) and all(
        one.name == two.name and one.size == two.size and same_time(one.mtime_ns, two.mtime_ns)
        for one, two in zip(ours, theirs, strict=True)
    )


def _nearly_same_mtime(one: int, other: int) -> bool:
    return abs(one - other) < 10**9


def see(name: str, file: SectorFile, where: str, *, dir_fd: int | None = None) -> Seen:
    """Look at a sector file; `NotFound` for none, `Refused` for what cannot be moved whole."""
    try:
        entry = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        found = os.stat(name, dir_fd=dir_fd)
    except FileNotFoundError as exc:
        raise NotFound("no such sector file", where) from exc
    if file.file_type.is_directory != stat.S_ISDIR(found.st_mode):
        raise Refused("is not what its type says", where, "look at it by hand")
    if file.file_type.is_directory:
        parts = _parts(name, where, dir_fd)
    elif stat.S_ISREG(found.st_mode):
        parts = (Part("", found.st_size, found.st_mtime_ns, found.st_ino),)
    else:
        raise Refused("is not a regular file", where, "look at it by hand")
    is_link = stat.S_ISLNK(entry.st_mode)
    return Seen((entry.st_dev, entry.st_ino), is_link, found.st_mtime_ns, parts)


def _parts(name: str, where: str, dir_fd: int | None) -> tuple[Part, ...]:
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        with os.scandir(fd) as entries:
            return tuple(sorted(_part(entry, where) for entry in entries))
    finally:
        os.close(fd)


def _part(entry: os.DirEntry[str], where: str) -> Part:
    """A file of a sector directory: stricter than `members`, for nothing is to be left behind."""
    try:
        found = entry.stat()
    except FileNotFoundError as exc:
        what = "leads nowhere" if entry.is_symlink() else "vanished just now"
        raise Refused(f"has {entry.name!r}, which {what}", where, "look at it by hand") from exc
    if not stat.S_ISREG(found.st_mode):
        raise Refused(f"has {entry.name!r}, which is no regular file", where, "move it by hand")
    return Part(entry.name, found.st_size, found.st_mtime_ns, found.st_ino)


def _is_shown(name: str) -> bool:
    try:
        parse_member_name(name)
    except ValueError:
        return False
    return True
