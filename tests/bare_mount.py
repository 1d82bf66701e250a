"""A file system of a few lines over pyfuse3: what a mount does with nothing of sectorfs above it.

What touches it in the test's own process, a `close` too, must be in a thread.

It shows the files of a directory, numbered in the order of their names; all who open a file get one
handle. What reaches it is counted: the rest was answered by somebody else.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pyfuse3
import trio

from sectorfs.fuse import kernel, mounts

FIRST = pyfuse3.ROOT_INODE + 1
HANDLES = 1_000_000
"""The handle of an inode is its number and this."""


class Bare(pyfuse3.Operations):
    """The file system."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.paths = [root / name for name in sorted(os.listdir(root))]
        self.asked: Counter[str] = Counter()
        """Requests by name."""
        self.released: Counter[int] = Counter()
        """Releases by inode."""
        self.largest_read = 0
        self.backing: dict[int, int] = {}
        """Backing ids with which inodes are opened."""
        self.cache_directories = False
        self.introduced = trio.Event()

    def number(self, name: str) -> int:
        """The inode of a file."""
        return FIRST + [path.name for path in self.paths].index(name)

    def init(self) -> None:
        self.introduced.set()

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.entry_timeout = entry.attr_timeout = 300
        if inode == pyfuse3.ROOT_INODE:
            entry.st_mode, entry.st_nlink = stat.S_IFDIR | 0o555, 2
        else:
            entry.st_mode, entry.st_nlink = stat.S_IFREG | 0o444, 1
            entry.st_size = self.paths[inode - FIRST].stat().st_size
        return entry

    async def lookup(self, parent_inode, name, ctx):  # type: ignore[no-untyped-def]
        self.asked["lookup"] += 1
        try:
            return self._attributes(self.number(os.fsdecode(name)))
        except ValueError:
            raise pyfuse3.FUSEError(errno.ENOENT) from None

    async def getattr(self, inode, ctx=None):  # type: ignore[no-untyped-def]
        self.asked["getattr"] += 1
        return self._attributes(inode)

    async def open(self, inode, flags, ctx):  # type: ignore[no-untyped-def]
        self.asked["open"] += 1
        if inode in self.backing:
            kernel.mark_open(inode + HANDLES, backing_id=self.backing[inode])
        return pyfuse3.FileInfo(fh=inode + HANDLES, keep_cache=True)

    async def read(self, fh, off, size):  # type: ignore[no-untyped-def]
        self.asked["read"] += 1
        self.largest_read = max(self.largest_read, size)
        with self.paths[fh - HANDLES - FIRST].open("rb") as file:
            return os.pread(file.fileno(), size, off)

    async def flush(self, fh):  # type: ignore[no-untyped-def]
        raise pyfuse3.FUSEError(errno.ENOSYS)

    async def release(self, fh):  # type: ignore[no-untyped-def]
        self.asked["release"] += 1
        self.released[fh - HANDLES] += 1

    async def opendir(self, inode, ctx):  # type: ignore[no-untyped-def]
        self.asked["opendir"] += 1
        kernel.mark_open(inode, cache_directory=self.cache_directories)
        return inode

    async def readdir(self, fh, start_id, token):  # type: ignore[no-untyped-def]
        self.asked["readdir"] += 1
        for position, path in list(enumerate(self.paths))[start_id:]:
            attributes = self._attributes(FIRST + position)
            if not pyfuse3.readdir_reply(token, os.fsencode(path.name), attributes, position + 1):
                break


@asynccontextmanager
async def bare_mount(root: Path) -> AsyncIterator[tuple[Bare, Path]]:
    """The file system over `root`, and where it is mounted."""
    mountpoint = root.with_name(f"{root.name}-mnt")
    mountpoint.mkdir(exist_ok=True)
    bare = Bare(root)
    kernel.prepare()
    pyfuse3.init(bare, str(mountpoint), {"fsname=bare", "subtype=bare", "ro"})
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pyfuse3.main, 1, 200)
            await bare.introduced.wait()
            try:
                yield bare, mountpoint
            finally:
                mount = mounts.find_mount(mountpoint)
                assert mount is not None
                with trio.CancelScope(shield=True):
                    # In a thread: files open in it are released, which the loop has to answer.
                    await trio.to_thread.run_sync(mounts.abort, mount.minor)
                    await trio.to_thread.run_sync(mounts.detach, mountpoint)
                nursery.cancel_scope.cancel()
    finally:
        pyfuse3.close(unmount=False)
