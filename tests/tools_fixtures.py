"""A node over real file systems, with the ways a file of its mount can be read."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster import Node, until
from tests.cluster_fixtures import attach, noise, put
from tests.file_systems import KINDS, file_system, why_not

WAYS = ("extension", "plain")
"""With what pyfuse3 leaves out of the kernel's protocol, and without."""
MIB = 1 << 20
GIB = 1 << 30
SPARSE = 64 * GIB
ISLANDS = (0, 4 * GIB - 5, 5 * GIB, 33 * GIB + 4095, SPARSE - 11)
"""Where the sparse file has data: across 4 GiB, across a page, and at its very end."""
SIZES = {
    "empty": 0,
    "one": 1,
    "page": 4097,
    "small": MIB - 1,
    "least": MIB,
    "large": 5 * MIB + 3,
}
"""Sizes on both sides of 1 MiB, from which on the kernel may read without the daemon."""
MEMBERS = {
    "p_aux": 64,
    "t_aux": 0,
    "sc-02-data-layer-1.dat": MIB - 1,
    "sc-02-data-tree-r-last.dat": 2 * MIB + 32,
}
"""Files of the sector directory, and their sizes; one with holes comes to them."""
PATIENCE = 60.0
"""Seconds a tool may take before its test fails."""


@dataclass(frozen=True)
class Content:
    """What a file holds: its size, and bytes at offsets; zeros elsewhere."""

    size: int
    islands: Mapping[int, bytes]

    def slice(self, offset: int, count: int) -> bytes:
        """What a read gives, short at the end."""
        end = min(offset + count, self.size)
        found = bytearray(max(0, end - offset))
        for start, data in self.islands.items():
            low, high = max(start, offset), min(start + len(data), end)
            if low < high:
                found[low - offset : high - offset] = data[low - start : high - start]
        return bytes(found)

    def edges(self) -> list[tuple[int, int]]:
        """Reads (offset, count) where something begins or ends."""
        places = {0, 4095, 128 << 10, MIB - 1, self.size - 1, self.size, self.size + 4096}
        places |= set(self.islands)
        reads = [(place, count) for place in sorted(places) for count in (1, 10, 4098)]
        if self.size <= 8 * MIB:
            reads += [(0, self.size + 1), (1, MIB)]
        return [(offset, count) for offset, count in reads if offset >= 0]


class Disk:
    """A storage path on a file system of its own, filled before it is attached."""

    def __init__(self, kind: str, place: int, root: Path) -> None:
        self.kind = kind
        self.root = root
        self._first = 1000 * (place + 1)
        self.contents: dict[str, Content] = {}
        """By relative path."""
        for step, (name, size) in enumerate(SIZES.items()):
            self._put(f"sealed/{self._sector(step)}", noise(f"{kind} {name}", size))
        for name, size in MEMBERS.items():
            self._put(f"{self.folder}/{name}", noise(f"{kind} {name}", size))
        holes = {start: noise(f"{kind} {start}", 5000) for start in (100_000, 3 * MIB)}
        self._put_sparse(f"{self.folder}/sc-02-data-tree-c-0.dat", 4 * MIB, holes)
        islands = {start: noise(f"{kind} {start}", 11) for start in ISLANDS}
        self._put_sparse(self.sparse, SPARSE, islands)

    def _sector(self, step: int) -> str:
        return f"s-t01000-{self._first + step}"

    def path(self, name: str) -> str:
        """Relative path of the file with a name of `SIZES`."""
        return f"sealed/{self._sector(list(SIZES).index(name))}"

    def own(self, file_type: str, step: int) -> str:
        """Relative path of a sector file that the test makes."""
        assert step >= len(SIZES)
        return f"{file_type}/{self._sector(step)}"

    @property
    def sparse(self) -> str:
        """Relative path of the sparse file."""
        return f"unsealed/{self._sector(0)}"

    @property
    def folder(self) -> str:
        """Relative path of the sector directory."""
        return f"cache/{self._sector(0)}"

    @property
    def member(self) -> str:
        """Relative path of the largest file in the sector directory."""
        return f"{self.folder}/sc-02-data-tree-r-last.dat"

    def _put(self, relative: str, data: bytes) -> None:
        put(self.root / relative, data)
        self.contents[relative] = Content(len(data), {0: data})

    def _put_sparse(self, relative: str, size: int, islands: Mapping[int, bytes]) -> None:
        path = self.root / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream:
            stream.truncate(size)
            for start, data in islands.items():
                stream.seek(start)
                stream.write(data)
        self.contents[relative] = Content(size, islands)

    def forget(self, mountpoint: Path) -> None:
        """Make the next reads cold: no page of any file stays cached, above or below."""
        for relative in self.contents:
            for tree in (mountpoint, self.root):
                fd = os.open(tree / relative, os.O_RDONLY)
                try:
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                finally:
                    os.close(fd)


@dataclass(frozen=True)
class MountedDisks:
    """A mounted node and its disks by the kind of their file system."""

    node: Node
    disks: Mapping[str, Disk]
    missing: Mapping[str, str]
    """Why there is no disk of a kind."""

    def disk(self, kind: str) -> Disk:
        """The disk of a kind, or the test is skipped."""
        if kind in self.missing:
            pytest.skip(self.missing[kind])
        return self.disks[kind]

    def seen(self, relative: str) -> Path:
        """A path in the mount."""
        return self.node.mountpoint / relative

    def wait_for(self, relative: str) -> None:
        """Wait until the mount shows a path."""
        until(relative, self.seen(relative).exists)


def node_of(root: Path, way: str, name: str = "node") -> Node:
    """A node that reads one way; skips the test where it cannot."""
    node = Node(root, name)
    if way == "plain":
        node.environment["SECTORFS_NO_EXTENSION"] = "1"
    elif importlib.util.find_spec("sectorfs.fuse._kernel") is None:
        pytest.skip("the extension for the kernel was not built")
    elif os.environ.get("SECTORFS_NO_EXTENSION"):
        pytest.skip("the extension is left out")
    return node


@contextmanager
def mounted_disks(
    root: Path,
    way: str,
    kinds: Sequence[str] = KINDS,
    *,
    fill: Callable[[Disk], None] | None = None,
) -> Iterator[MountedDisks]:
    """A mounted node over one disk of each kind, with the usual files and those of `fill`."""
    node = node_of(root, way)
    missing = {kind: reason for kind in kinds if (reason := why_not(kind))}
    with ExitStack() as stack:
        disks = {}
        for place, kind in enumerate(kinds):
            if kind not in missing:
                disks[kind] = Disk(kind, place, stack.enter_context(file_system(root, kind)))
        for disk in disks.values():
            if fill is not None:
                fill(disk)
        os.sync()  # only pages that were written back can be forgotten
        stack.callback(node.end)
        node.start(mount=True)
        for disk in disks.values():
            attach(node, disk.root)
        found = MountedDisks(node, disks, missing)
        for disk in disks.values():
            for relative in disk.contents:
                found.wait_for(relative)
        yield found
