"""Takes a sector file from its name by one rename, from which it can still come back. Blocks.

What is set aside lies below ``fetching`` under a name of our own (see `own_names`); on a disk that
has no room for that directory, beside the file. It is whole until `give_up` gives it another name:
what a crash leaves under the first one gets its own name back, under the second one it is deleted.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import msgspec

from sectorfs.errors import NotFound, Refused, SectorFSError, Stale
from sectorfs.stores.own_names import (
    delete,
    delete_own,
    exists,
    opened_fetching,
    opened_type,
    own_name,
    rename_new,
)
from sectorfs.stores.seen import Seen, see
from sectorfs.types import SectorFile, StorageID

log = logging.getLogger(__name__)


class Expected(msgspec.Struct, frozen=True):
    """What is to be removed, as somebody else saw it: anything else under its name stays."""

    size: int
    mtime_ns: int


class Place(msgspec.Struct, frozen=True):
    """A sector file of a storage path, and whose name it is set aside under."""

    path: str
    storage: StorageID
    file: SectorFile
    owner: str

    @property
    def aside(self) -> str:
        """The name it is set aside under."""
        return own_name(self.file, self.owner, "out")

    @property
    def gone(self) -> str:
        """The name it is deleted under."""
        return own_name(self.file, self.owner, "gone")

    @property
    def where(self) -> str:
        """Where it lies, for messages."""
        return os.path.join(self.path, str(self.file))


class Aside(msgspec.Struct, frozen=True):
    """A sector file that was set aside."""

    place: Place
    beside: bool
    """It lies beside its own name, for want of room below ``fetching``."""


def set_aside(place: Place, expected: Seen | Expected | None) -> Aside | None:
    """Rename a file to a name of our own; None when nothing is there.

    `Stale` when something else than what is `expected` lies there: that stays.
    """
    kind = place.file.file_type
    try:
        with opened_type(place.path, place.storage, kind) as type_fd:
            _clear(place, type_fd)
            _check(place.file.sector.name, place, type_fd, expected)
            try:
                with opened_fetching(type_fd, place.path, kind, make=True) as fd:
                    _rename(place, type_fd, fd, expected)
                    return Aside(place, beside=False)
            except OSError as exc:
                if exc.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
            # No room for a directory, and removing is how to make some.
            _rename(place, type_fd, type_fd, expected)
            return Aside(place, beside=True)
    except FileNotFoundError:
        return None


def _clear(place: Place, type_fd: int) -> None:
    """Bring an earlier attempt to an end."""
    for name in (place.gone, place.aside):
        if name == place.aside and not exists(place.file.sector.name, type_fd):
            with suppress(FileNotFoundError):
                put_back(Aside(place, beside=exists(name, type_fd)))
            continue
        delete(name, type_fd)
        delete_own(place.path, place.storage, place.file, name)


@contextmanager
def _opened(aside: Aside) -> Iterator[tuple[int, int]]:
    """Descriptors of the type directory, and of the one that the file is set aside in."""
    place, kind = aside.place, aside.place.file.file_type
    with opened_type(place.path, place.storage, kind) as type_fd:
        if aside.beside:
            yield type_fd, type_fd
        else:
            with opened_fetching(type_fd, place.path, kind) as fd:
                yield type_fd, fd


def put_back(aside: Aside) -> None:
    """Give a file its name again; `FileExistsError` when something else came there meanwhile."""
    place = aside.place
    with _opened(aside) as (type_fd, fd):
        rename_new(place.aside, place.file.sector.name, source_fd=fd, target_fd=type_fd)
        os.fsync(type_fd)


def put_back_late(aside: Aside | None) -> None:
    """`put_back` for a rename that nobody waited for any more; never raises."""
    if aside is None:
        return
    try:
        put_back(aside)
    except (OSError, SectorFSError) as exc:
        log.error("%s was set aside too late, and stays so: %s", aside.place.where, exc)
    else:
        log.warning("%s was set aside too late, and is back", aside.place.where)


def give_up(aside: Aside) -> None:
    """It is not to come back, not even after a crash."""
    with _opened(aside) as (_, fd):
        os.rename(aside.place.aside, aside.place.gone, src_dir_fd=fd, dst_dir_fd=fd)


def delete_aside(aside: Aside) -> None:
    """Delete what was given up."""
    with _opened(aside) as (_, fd):
        delete(aside.place.gone, fd)


def _rename(place: Place, type_fd: int, target_fd: int, expected: Seen | Expected | None) -> None:
    """Set a file aside, and back again when it is not the one that was meant."""
    name = place.file.sector.name
    os.rename(name, place.aside, src_dir_fd=type_fd, dst_dir_fd=target_fd)
    try:
        _check(place.aside, place, target_fd, expected)
    except SectorFSError:
        rename_new(place.aside, name, source_fd=target_fd, target_fd=type_fd)
        raise


def _check(name: str, place: Place, dir_fd: int, expected: Seen | Expected | None) -> None:
    """`Stale` when something else lies there than what is to be removed."""
    if expected is None:
        return
    try:
        found = see(name, place.file, place.where, dir_fd=dir_fd)
    except NotFound as exc:
        raise FileNotFoundError(place.where) from exc
    if isinstance(expected, Seen):
        same = (found.entry, found.parts) == (expected.entry, expected.parts)
    else:
        facts = found.facts(place.file)
        same = (facts.size, facts.mtime_ns) == (expected.size, expected.mtime_ns)
        _refuse_untold(found, [member.name for member in facts.members or ()], place)
    if not same:
        raise Stale("was replaced meanwhile, and stays", place.where, "move it again")


def _refuse_untold(found: Seen, told: list[str], place: Place) -> None:
    """`Refused` for files that whoever saw the directory over the network was not told of."""
    untold = [part.name for part in found.parts if part.name and part.name not in told]
    if untold:
        raise Refused(
            f"has {untold[0]!r}, which was not moved, and stays",
            place.where,
            "take it out by hand, then move or remove it again",
        )
