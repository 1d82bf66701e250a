"""Tar streams for tests: made from contents, and read back in pieces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from sectorfs.stores.tar_reader import Ending, MemberBegins, MemberData, MemberEnds, TarReader
from sectorfs.stores.tar_writer import FilePart, TarMember, TarWriter

MTIME = 1_600_000_000
END = 1024
"""Bytes that close an archive."""


def members_for(files: Mapping[str, bytes]) -> list[TarMember]:
    """A member per content, all of one time."""
    return [
        TarMember(name=name, size=len(data), mtime_ns=MTIME * 10**9) for name, data in files.items()
    ]


def parts(files: Mapping[str, bytes]) -> Iterator[bytes]:
    """The stream of our writer, with the contents put in."""
    for part in TarWriter(members_for(files)):
        yield files[part.name] if isinstance(part, FilePart) else part


def stream(files: Mapping[str, bytes]) -> bytes:
    """A whole archive in one piece."""
    return b"".join(parts(files))


def unterminated(files: Mapping[str, bytes]) -> bytes:
    """The same as old peers send it: it ends with the last byte of the last file."""
    last = files[max(files)]
    return stream(files)[: -END - (-len(last) % 512)]


def chunks(data: bytes, size: int) -> Iterator[bytes]:
    """Pieces of a stream."""
    for at in range(0, len(data), size):
        yield data[at : at + size]


def read(
    pieces: Iterable[bytes], reader: TarReader | None = None
) -> tuple[dict[str, bytes], Ending]:
    """Contents by name and the verdict, the order of events checked on the way."""
    reader = reader or TarReader("peer", max_total=2**40)
    contents: dict[str, bytes] = {}
    current = None
    for piece in pieces:
        for event in reader.feed(piece):
            match event:
                case MemberBegins(facts):
                    assert current is None
                    current = facts
                    contents[facts.name] = b""
                case MemberData(data):
                    assert current is not None
                    assert data
                    contents[current.name] += bytes(data)
                case MemberEnds(facts):
                    assert facts == current
                    assert len(contents[facts.name]) == facts.size
                    current = None
    ending = reader.finish()
    assert [member.name for member in ending.members] == list(contents)
    return contents, ending
