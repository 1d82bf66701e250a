"""What a sector directory consists of: regular files with plain names, links to such included.

One rule for all who look: what the Index is told, what the mount shows, what peers are sent and
what a move takes along is the same. Links are followed, as those in place of whole sector files
are: operators keep single layers or trees on another disk that way.
"""

from __future__ import annotations

import os
import stat

from sectorfs.errors import NotFound
from sectorfs.index import checks
from sectorfs.types import SectorFile, parse_member_name

MAX_MEMBERS = checks.MAX_MEMBERS
"""Files in one sector directory, as the Index takes them; a real one has fewer than sixty."""


def member_stat(entry: os.DirEntry[str]) -> os.stat_result | None:
    """The file that a directory entry stands for; None when it is none of the directory's files.

    A link to nothing is none. Blocks, and raises any other `OSError`.
    """
    try:
        parse_member_name(entry.name)
        found = entry.stat()
    except (ValueError, FileNotFoundError):
        return None
    return found if stat.S_ISREG(found.st_mode) else None


def check_member(file: SectorFile, member: str | None) -> None:
    """`NotFound` unless the name can be that of a file: no name leads out of its directory."""
    if file.file_type.is_directory != (member is not None):
        raise NotFound("is a directory" if member is None else "is not a directory", file)
    if member is not None:
        try:
            parse_member_name(member)
        except ValueError as exc:
            raise NotFound(str(exc), file) from exc
