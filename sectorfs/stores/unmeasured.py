"""Receive a file from a node that does not say how long it is: to its end, and no word more.

The first lotus nodes end a body that their disk failed to give as if it were whole. So what came is
judged by what it must be: as long as its sector, or, unsealed, that and a trailer which can be
read. Any other size of a sector will not do, for a body may well end there too. Such nodes know no
piece, which may have any length.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from sectorfs.errors import SourceFailed
from sectorfs.stores import layout, trailer
from sectorfs.stores.copies import Copies
from sectorfs.stores.lanes import Descriptor
from sectorfs.stores.sources import PeerSource
from sectorfs.stores.trailer import PartialFile
from sectorfs.stores.transfer import PeerClient
from sectorfs.stores.writing import SteadyWrites
from sectorfs.types import Facts, FileType, SectorFile


async def receive_unmeasured(
    peers: PeerClient,
    copies: Copies,
    source: PeerSource,
    file: SectorFile,
    *,
    sector_size: int,
    progress: Callable[[int], object],
) -> Facts:
    """Keep a file in the cache path, and tell its facts; `SourceFailed` unless it is whole."""
    if file.file_type is FileType.PIECE:
        raise SourceFailed("does not say how long it is", f"{source.url}/{file}")
    begun = await copies.begin(file, None, sector_size)
    run = SteadyWrites(copies.write, begun.descriptor)

    def wrote(done: int) -> None:
        progress(done)
        run.wrote(done)

    try:
        facts = await peers.fetch_unmeasured(
            source.url,
            file,
            begun.descriptor,
            limit=sector_size + trailer.MAX_LENGTH,
            run=run,
            progress=wrote,
        )
        judge = partial(_judge, begun.descriptor, file, facts.size, sector_size, source.url)
        await copies.write(judge, what=f"look at copy of {file}")
        await copies.commit(begun, size=facts.size, mtime_ns=facts.mtime_ns)
    except BaseException:
        await copies.discard(begun)
        raise
    return facts


def _judge(descriptor: Descriptor, file: SectorFile, size: int, sector_size: int, url: str) -> None:
    """`SourceFailed` unless this can be the whole file of a sector; blocks."""
    thing = f"{url}/{file}"
    hint = f"expected of a sector of {sector_size} bytes; see mount.sector_size"
    if not layout.file_fits(file.file_type, size, sector_size=sector_size):
        raise SourceFailed(f"sent {size} bytes, which no whole file of it has", thing, hint)
    if file.file_type is not FileType.UNSEALED:
        return
    if size == sector_size:
        raise SourceFailed(f"sent {size} bytes without a trailer", thing, hint)
    PartialFile.open(descriptor, sector_size=sector_size, thing=thing)
