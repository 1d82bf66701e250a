"""A disk that hangs or fails on command: a mirror of a directory, mounted by a process of its own.

Run as ``python hung_disk.py SOURCE MOUNTPOINT``. Lines on its standard input tell it what to do:
``hang read open`` (those operations wait from now on), ``fail write 4096 s-t0`` (writes to files
with that in their path get EIO once so many bytes were written; other operations once so many calls
were answered), ``go`` (all is well again), ``waiting`` (how many wait). Each is answered by one
line, so that whoever asked knows that it is in force. At the end of its input the program ends, and
with it the mount's connection: nothing outlives a test.

Reads and writes are direct and nothing is cached, so that each operation of a user is a request
here; a thread that waits in one cannot be killed, as on a disk whose driver does not answer.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pyfuse3
import trio

from sectorfs.fuse import mounts
from tests.mount_clients import read_line

READING = ("lookup", "getattr", "opendir", "readdir", "open", "read", "flush", "statfs")
WRITING = (
    *("create", "write", "fsync", "fsyncdir", "setattr"),
    *("mkdir", "unlink", "rmdir", "rename", "link"),
)
OPERATIONS = (*READING, *WRITING)
PATIENCE = 10.0
"""Seconds within which the program answers a command."""


class Mirror(pyfuse3.Operations):
    """The file system."""

    def __init__(self, source: str) -> None:
        super().__init__()
        # A number stays with a file while it has names, and is never given to another one.
        self._paths = {pyfuse3.ROOT_INODE: source}
        self._numbers = {source: pyfuse3.ROOT_INODE}
        self._last = int(pyfuse3.ROOT_INODE)
        self._opened: dict[int, str] = {}
        self.hung: frozenset[str] = frozenset()
        self.failing: dict[str, tuple[int, str]] = {}
        """Per operation what it still answers, and what the paths must have in them to fail."""
        self.waiting: Counter[str] = Counter()
        self._go = trio.Event()

    def hang(self, operations: frozenset[str]) -> None:
        self.hung = operations

    def fail(self, operation: str, after: int, only: str) -> None:
        self.failing[operation] = (after, only)

    def go(self) -> None:
        self.hung = frozenset()
        self.failing.clear()
        self._go.set()
        self._go = trio.Event()

    @asynccontextmanager
    async def _answering(
        self, operation: str, path: str = "", *, size: int = 1
    ) -> AsyncIterator[None]:
        """Wait while the operation hangs; what the disk itself says becomes the answer."""
        while operation in self.hung:
            self.waiting[operation] += 1
            try:
                await self._go.wait()
            finally:
                self.waiting[operation] -= 1
        left, only = self.failing.get(operation, (0, "\0"))
        if only in path:
            if left < size:
                raise pyfuse3.FUSEError(errno.EIO)
            self.failing[operation] = (left - size, only)
        try:
            yield
        except OSError as exc:
            raise pyfuse3.FUSEError(exc.errno or errno.EIO) from exc

    def _attributes(self, path: str) -> pyfuse3.EntryAttributes:
        found = os.lstat(path)
        entry = pyfuse3.EntryAttributes()
        if path not in self._numbers:
            self._last += 1
            self._name(self._last, path)
        entry.st_ino = self._numbers[path]
        entry.st_mode = found.st_mode
        entry.st_nlink = found.st_nlink
        entry.st_size = found.st_size
        entry.st_blocks = found.st_blocks
        entry.st_uid, entry.st_gid = found.st_uid, found.st_gid
        entry.st_mtime_ns = entry.st_atime_ns = entry.st_ctime_ns = found.st_mtime_ns
        entry.entry_timeout = entry.attr_timeout = 0
        return entry

    def _name(self, number: int, path: str) -> None:
        self._numbers[path] = number
        self._paths[number] = path

    def _unname(self, path: str) -> None:
        number = self._numbers.pop(path, None)
        for other, same in self._numbers.items():
            if same == number:
                self._paths[number] = other

    def _below(self, parent: int, name: bytes) -> str:
        return os.path.join(self._paths[parent], os.fsdecode(name))

    async def lookup(self, parent_inode, name, ctx):  # type: ignore[no-untyped-def]
        path = self._below(parent_inode, name)
        async with self._answering("lookup", path):
            return self._attributes(path)

    async def getattr(self, inode, ctx=None):  # type: ignore[no-untyped-def]
        async with self._answering("getattr", self._paths[inode]):
            return self._attributes(self._paths[inode])

    async def setattr(self, inode, attr, fields, fh, ctx):  # type: ignore[no-untyped-def]
        path = self._paths[inode]
        async with self._answering("setattr", path):
            if fields.update_size:
                os.truncate(path, attr.st_size)
            if fields.update_mode:
                os.chmod(path, attr.st_mode & 0o7777)
            if fields.update_mtime:
                os.utime(path, ns=(attr.st_mtime_ns, attr.st_mtime_ns), follow_symlinks=False)
            return self._attributes(path)

    async def opendir(self, inode, ctx):  # type: ignore[no-untyped-def]
        async with self._answering("opendir", self._paths[inode]):
            return inode

    async def readdir(self, fh, start_id, token):  # type: ignore[no-untyped-def]
        path = self._paths[fh]
        async with self._answering("readdir", path):
            for position, name in enumerate(sorted(os.listdir(path))[start_id:], start_id + 1):
                entry = self._attributes(os.path.join(path, name))
                if not pyfuse3.readdir_reply(token, os.fsencode(name), entry, position):
                    break

    async def fsyncdir(self, fh, datasync):  # type: ignore[no-untyped-def]
        async with self._answering("fsyncdir", self._paths[fh]):
            return

    async def open(self, inode, flags, ctx):  # type: ignore[no-untyped-def]
        path = self._paths[inode]
        async with self._answering("open", path):
            fd = os.open(path, flags & (os.O_ACCMODE | os.O_TRUNC) | os.O_CLOEXEC)
            return self._handle(fd, path)

    async def create(self, parent_inode, name, mode, flags, ctx):  # type: ignore[no-untyped-def]
        path = self._below(parent_inode, name)
        async with self._answering("create", path):
            kept = os.O_ACCMODE | os.O_EXCL | os.O_TRUNC
            fd = os.open(path, flags & kept | os.O_CREAT | os.O_CLOEXEC, mode & 0o7777)
            return self._handle(fd, path), self._attributes(path)

    def _handle(self, fd: int, path: str) -> pyfuse3.FileInfo:
        self._opened[fd] = path
        return pyfuse3.FileInfo(fh=fd, direct_io=True, keep_cache=False)

    async def read(self, fh, off, size):  # type: ignore[no-untyped-def]
        async with self._answering("read", self._opened[fh], size=size):
            return os.pread(fh, size, off)

    async def write(self, fh, off, buf):  # type: ignore[no-untyped-def]
        async with self._answering("write", self._opened[fh], size=len(buf)):
            return os.pwrite(fh, buf, off)

    async def fsync(self, fh, datasync):  # type: ignore[no-untyped-def]
        async with self._answering("fsync", self._opened[fh]):
            return

    async def flush(self, fh):  # type: ignore[no-untyped-def]
        async with self._answering("flush", self._opened[fh]):
            return

    async def release(self, fh):  # type: ignore[no-untyped-def]
        del self._opened[fh]
        os.close(fh)

    async def mkdir(self, parent_inode, name, mode, ctx):  # type: ignore[no-untyped-def]
        path = self._below(parent_inode, name)
        async with self._answering("mkdir", path):
            os.mkdir(path, mode & 0o7777)
            return self._attributes(path)

    async def unlink(self, parent_inode, name, ctx):  # type: ignore[no-untyped-def]
        path = self._below(parent_inode, name)
        async with self._answering("unlink", path):
            os.unlink(path)
            self._unname(path)

    async def rmdir(self, parent_inode, name, ctx):  # type: ignore[no-untyped-def]
        path = self._below(parent_inode, name)
        async with self._answering("rmdir", path):
            os.rmdir(path)
            self._unname(path)

    async def rename(self, parent_inode_old, name_old, parent_inode_new, name_new, flags, ctx):  # type: ignore[no-untyped-def]
        old = self._below(parent_inode_old, name_old)
        new = self._below(parent_inode_new, name_new)
        async with self._answering("rename", old):
            if flags:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            os.rename(old, new)
            self._unname(new)
            for path, number in list(self._numbers.items()):
                if path == old or path.startswith(f"{old}/"):
                    del self._numbers[path]
                    self._name(number, new + path.removeprefix(old))

    async def link(self, inode, new_parent_inode, new_name, ctx):  # type: ignore[no-untyped-def]
        path = self._below(new_parent_inode, new_name)
        async with self._answering("link", path):
            os.link(self._paths[inode], path)
            self._name(inode, path)
            return self._attributes(path)

    async def statfs(self, ctx):  # type: ignore[no-untyped-def]
        async with self._answering("statfs"):
            found = os.statvfs(self._paths[pyfuse3.ROOT_INODE])
            result = pyfuse3.StatvfsData()
            for name in ("bsize", "frsize", "blocks", "bfree", "bavail", "files", "ffree"):
                setattr(result, f"f_{name}", getattr(found, f"f_{name}"))
            result.f_favail = found.f_favail
            result.f_namemax = found.f_namemax
            return result


async def obey(mirror: Mirror) -> None:
    """Carry out commands until the input ends."""
    rest = b""
    async with trio.lowlevel.FdStream(os.dup(0)) as commands:
        async for data in commands:
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                word, *names = line.decode().split()
                if word == "hang":
                    mirror.hang(frozenset(names))
                elif word == "fail":
                    mirror.fail(names[0], int(names[1]), "".join(names[2:]))
                elif word == "go":
                    mirror.go()
                print(json.dumps(dict(mirror.waiting)), flush=True)


async def serve(mirror: Mirror) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pyfuse3.main, 1, 2000)
        print("{}", flush=True)
        await obey(mirror)
        nursery.cancel_scope.cancel()


def main(source: str, mountpoint: str) -> None:
    mirror = Mirror(os.path.abspath(source))
    options = set(pyfuse3.default_options) | {"fsname=hung_disk", "subtype=hung_disk"}
    options.discard("default_permissions")
    pyfuse3.init(mirror, mountpoint, options)
    try:
        trio.run(serve, mirror)
    finally:
        os._exit(0)  # whatever still waits: the kernel ends the connection with the process


class HungDisk:
    """The other end: a running program, and what a test does with it."""

    def __init__(self, process: subprocess.Popen[bytes], source: Path, path: Path) -> None:
        self._process = process
        self.source = source
        """Where to write what the disk holds."""
        self.path = path
        """Where it is mounted."""

    def hang(self, *operations: str) -> None:
        """Stop answering these operations (all of them when none is named)."""
        assert set(operations) <= set(OPERATIONS)
        self._command(f"hang {' '.join(operations or OPERATIONS)}")

    def fail(self, operation: str, *, after: int = 0, only: str = "") -> None:
        """Answer EIO after so many bytes of a read or write, or so many calls of anything else.

        `only`: for paths with that in them; not for the disk as a whole.
        """
        assert operation in OPERATIONS
        self._command(f"fail {operation} {after} {only}")

    def go(self) -> None:
        """Answer everything again."""
        self._command("go")

    def waiting(self, operation: str) -> int:
        """Requests of one kind that wait now."""
        return self._command("waiting").get(operation, 0)

    def _command(self, line: str) -> dict[str, int]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())
        self._process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, int]:
        assert self._process.stdout is not None
        answer: dict[str, int] = json.loads(read_line(self._process.stdout, PATIENCE))
        return answer


@contextmanager
def hung_disk(root: Path) -> Iterator[HungDisk]:
    """A disk that can hang, mounted below `root`; whatever it held up goes on at the end."""
    source, path = root / "hung-source", root / "hung"
    for directory in (source, path):
        directory.mkdir(parents=True, exist_ok=True)
    with (root / "hung.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, __file__, str(source), str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        )
    try:
        disk = HungDisk(process, source, path)
        disk.answer()
        yield disk
    finally:
        mount = mounts.find_mount(path)
        if mount is not None:
            mounts.abort(mount.minor)
            mounts.detach(path)
        process.kill()
        process.communicate()


if __name__ == "__main__":
    main(*sys.argv[1:])
