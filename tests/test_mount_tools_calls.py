"""Every system call that reads a file gives the same bytes through the mount as on the disk.

On ext4, xfs, btrfs and tmpfs, for files on both sides of 1 MiB, sparse ones of 64 GiB and files in
sector directories, with and without the extension for the kernel. Each read is cold: nothing is
cached above or below the mount.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.file_systems import KINDS
from tests.mount_clients import Clients
from tests.tools_fixtures import GIB, MIB, PATIENCE, WAYS, Content, MountedDisks, mounted_disks

pytestmark = pytest.mark.mount

PAGE = mmap.PAGESIZE


@pytest.fixture(scope="module", params=WAYS)
def disks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MountedDisks]:
    with mounted_disks(tmp_path_factory.mktemp("calls"), request.param) as found:
        yield found


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


# --- ways to read: (path, offset, count) → bytes ---


def by_pread(path: Path, offset: int, count: int) -> bytes:
    with opened(path) as fd:
        return os.pread(fd, count, offset)


def by_read(path: Path, offset: int, count: int) -> bytes:
    with opened(path) as fd:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.read(fd, count)


def by_preadv(path: Path, offset: int, count: int) -> bytes:
    """Into three buffers of uneven sizes, and a rest that stays untouched."""
    buffers = [bytearray(size) for size in (1, count // 3, count)]
    with opened(path) as fd:
        got = os.preadv(fd, buffers, offset)
    return b"".join(buffers)[: min(got, count)]


def by_direct(path: Path, offset: int, count: int) -> bytes:
    """Around the page cache: aligned, as a disk wants it."""
    low = offset // PAGE * PAGE
    size = -(-(offset + count - low) // PAGE) * PAGE
    with mmap.mmap(-1, size) as buffer, opened(path, os.O_RDONLY | os.O_DIRECT) as fd:
        got = os.preadv(fd, [buffer], low)
        return buffer[:got][offset - low : offset - low + count]


def _mapped(path: Path, offset: int, count: int, flags: int) -> bytes:
    low = offset // PAGE * PAGE
    with opened(path) as fd:
        count = min(count, os.fstat(fd).st_size - offset)
        if count <= 0:
            return b""  # nothing of the file is there to map
        size = offset - low + count
        with mmap.mmap(fd, size, flags=flags, prot=mmap.PROT_READ, offset=low) as view:
            return view[offset - low :]


def by_mmap_shared(path: Path, offset: int, count: int) -> bytes:
    return _mapped(path, offset, count, mmap.MAP_SHARED)


def by_mmap_private(path: Path, offset: int, count: int) -> bytes:
    return _mapped(path, offset, count, mmap.MAP_PRIVATE | mmap.MAP_POPULATE)


def by_sendfile_to_a_file(path: Path, offset: int, count: int) -> bytes:
    with opened(path) as fd, os.fdopen(os.memfd_create("sink"), "r+b") as sink:
        while count and (sent := os.sendfile(sink.fileno(), fd, offset, count)):
            offset, count = offset + sent, count - sent
        sink.seek(0)
        return sink.read()


def by_sendfile_to_a_socket(path: Path, offset: int, count: int) -> bytes:
    near, far = socket.socketpair()
    got = bytearray()
    with near, far, opened(path) as fd:
        while count and (sent := os.sendfile(near.fileno(), fd, offset, min(count, 32 << 10))):
            offset, count = offset + sent, count - sent
            got += far.recv(sent, socket.MSG_WAITALL)
    return bytes(got)


def by_splice(path: Path, offset: int, count: int) -> bytes:
    source, target = os.pipe()
    got = bytearray()
    try:
        with opened(path) as fd:
            while count and (
                moved := os.splice(fd, target, min(count, 64 << 10), offset_src=offset)
            ):
                offset, count = offset + moved, count - moved
                got += os.read(source, moved)
    finally:
        os.close(source)
        os.close(target)
    return bytes(got)


def by_advised_pread(path: Path, offset: int, count: int) -> bytes:
    """After the hints that prefetchers give."""
    libc = ctypes.CDLL(None, use_errno=True)
    with opened(path) as fd:
        for advice in (os.POSIX_FADV_SEQUENTIAL, os.POSIX_FADV_RANDOM, os.POSIX_FADV_WILLNEED):
            os.posix_fadvise(fd, offset, count, advice)
        ahead = libc.readahead(fd, ctypes.c_int64(offset), ctypes.c_size_t(count))
        assert ahead == 0, os.strerror(ctypes.get_errno())
        return os.pread(fd, count, offset)


READERS: list[Callable[[Path, int, int], bytes]] = [
    *(by_pread, by_read, by_preadv, by_direct, by_mmap_shared, by_mmap_private),
    *(by_sendfile_to_a_file, by_sendfile_to_a_socket, by_splice, by_advised_pread),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_every_way_to_read_gives_the_bytes_of_the_disk(
    disks: MountedDisks, read: Callable[[Path, int, int], bytes], kind: str
) -> None:
    disk = disks.disk(kind)
    disk.forget(disks.node.mountpoint)
    for relative, content in disk.contents.items():
        for offset, count in content.edges():
            got = read(disks.seen(relative), offset, count)
            assert got == content.slice(offset, count), (relative, offset, count)


@pytest.mark.parametrize("kind", KINDS)
def test_one_file_read_in_every_way_at_once(disks: MountedDisks, kind: str) -> None:
    """Open handles of different kinds share an inode: none may refuse or mislead another."""
    disk = disks.disk(kind)
    for relative in (disk.path("small"), disk.path("large"), disk.sparse):
        path, content = disks.seen(relative), disk.contents[relative]
        disk.forget(disks.node.mountpoint)
        with opened(path) as fd, mmap.mmap(fd, 0, prot=mmap.PROT_READ) as view:
            for read in READERS:
                assert read(path, 70_000, 9_000) == content.slice(70_000, 9_000), read.__name__
            assert view[70_000:79_000] == content.slice(70_000, 9_000)
            assert os.pread(fd, 9_000, 70_000) == content.slice(70_000, 9_000)


# --- open ---

FLAGS = ["O_NOATIME", "O_NONBLOCK", "O_SYNC", "O_NOFOLLOW", "O_CLOEXEC", "O_NOCTTY", "O_RSYNC"]


@pytest.mark.parametrize("kind", KINDS)
def test_flags_of_a_reading_open_change_nothing(disks: MountedDisks, kind: str) -> None:
    disk = disks.disk(kind)
    for name in ("page", "large"):
        content = disk.contents[disk.path(name)]
        for flag in FLAGS:
            with opened(disks.seen(disk.path(name)), os.O_RDONLY | getattr(os, flag)) as fd:
                assert os.pread(fd, 5000, 1) == content.slice(1, 5000), flag


def code(call: Callable[..., object], *arguments: object) -> int:
    """The errno a call fails with; 0 when it succeeds."""
    try:
        call(*arguments)
    except OSError as exc:
        return exc.errno or -1
    return 0


@contextmanager
def may_refuse(*codes: int) -> Iterator[None]:
    """One of these errors is as good as an answer."""
    try:
        yield
    except OSError as exc:
        if exc.errno not in codes:
            raise


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["page", "large"])
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (os.O_RDWR, errno.EROFS),
        (os.O_WRONLY, errno.EROFS),
        (os.O_RDWR | os.O_DIRECT, errno.EROFS),
        (os.O_WRONLY | os.O_APPEND, errno.EROFS),
        (os.O_RDONLY | os.O_TRUNC, errno.EROFS),
        (os.O_RDWR | os.O_CREAT, errno.EROFS),
        (os.O_RDONLY | os.O_CREAT | os.O_EXCL, errno.EEXIST),
        (os.O_RDONLY | os.O_DIRECTORY, errno.ENOTDIR),
    ],
)
def test_opening_for_writing_is_refused_while_others_read(
    disks: MountedDisks, kind: str, name: str, flags: int, expected: int
) -> None:
    relative = disks.disk(kind).path(name)
    path, content = disks.seen(relative), disks.disk(kind).contents[relative]
    with opened(path) as fd:
        assert code(os.open, path, flags) == expected
        assert os.pread(fd, 1, 4096) == content.slice(4096, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_reading_handle_cannot_do_is_refused_cleanly(disks: MountedDisks, kind: str) -> None:
    disk = disks.disk(kind)
    for name in ("page", "large"):
        with opened(disks.seen(disk.path(name))) as fd:
            assert code(os.pwrite, fd, b"x", 0) == errno.EBADF
            assert code(os.ftruncate, fd, 0) in (errno.EINVAL, errno.EROFS)
            assert code(os.posix_fallocate, fd, 0, 10) == errno.EBADF
            assert code(os.fchmod, fd, 0o600) == errno.EROFS
            assert code(mmap.mmap, fd, 0, mmap.MAP_SHARED) == errno.EACCES
            os.fsync(fd)
            os.fdatasync(fd)
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            assert os.pread(fd, 10, 0) == disk.contents[disk.path(name)].slice(0, 10)


@pytest.mark.parametrize("kind", KINDS)
def test_a_private_mapping_is_changed_for_its_owner_alone(disks: MountedDisks, kind: str) -> None:
    disk = disks.disk(kind)
    for name in ("page", "large"):
        path, content = disks.seen(disk.path(name)), disk.contents[disk.path(name)]
        with opened(path) as fd:
            with mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE) as view:
                view[0:4] = b"mine"
                assert view[0:8] == b"mine" + content.slice(4, 4)
                assert os.pread(fd, 8, 0) == content.slice(0, 8)
        assert path.read_bytes() == content.slice(0, content.size)
        assert (disk.root / disk.path(name)).read_bytes() == content.slice(0, content.size)


@pytest.mark.parametrize("kind", KINDS)
def test_duplicates_and_children_share_a_handle(disks: MountedDisks, kind: str) -> None:
    disk = disks.disk(kind)
    for name in ("page", "large"):
        content = disk.contents[disk.path(name)]
        with opened(disks.seen(disk.path(name))) as fd:
            copy = os.dup(fd)
            os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY))
            with opened(Path(f"/proc/self/fd/{fd}"), os.O_RDONLY | os.O_DIRECT):
                pass
            child = os.fork()
            if not child:  # in the child
                os._exit(os.pread(fd, 4000, 90) != content.slice(90, 4000))
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            os.close(copy)
            assert os.pread(fd, 4000, 90) == content.slice(90, 4000)


# --- positions and sizes ---


@pytest.mark.parametrize("kind", KINDS)
def test_data_is_never_called_a_hole(disks: MountedDisks, kind: str) -> None:
    """Holes may be shown as data; data never as a hole, and the end is where it is."""
    disk = disks.disk(kind)
    for relative, content in disk.contents.items():
        with opened(disks.seen(relative)) as fd:
            shown = data_ranges(fd, content.size)
            for start, data in content.islands.items():
                for place in (start, start + len(data) - 1):
                    if data:
                        assert any(low <= place < high for low, high in shown), (relative, place)
            for whence in (os.SEEK_DATA, os.SEEK_HOLE):
                assert code(os.lseek, fd, content.size + 1, whence) == errno.ENXIO
            assert os.lseek(fd, 0, os.SEEK_END) == content.size
            assert os.fstat(fd).st_size == content.size


def data_ranges(fd: int, size: int) -> list[tuple[int, int]]:
    """What SEEK_DATA and SEEK_HOLE say."""
    found = []
    place = 0
    while place < size:
        low = size
        with may_refuse(errno.ENXIO):  # no data up to the end
            low = os.lseek(fd, place, os.SEEK_DATA)
        if low == size:
            break
        place = os.lseek(fd, low, os.SEEK_HOLE)
        assert place > low
        found.append((low, place))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_read_beyond_any_file_is_empty(disks: MountedDisks, kind: str) -> None:
    disk = disks.disk(kind)
    for relative in disk.contents:
        with opened(disks.seen(relative)) as fd:
            for offset in (64 * GIB, 1 << 40, 1 << 62):
                assert os.pread(fd, MIB, offset) == b""
            assert code(os.pread, fd, 1, -1) == errno.EINVAL


@pytest.mark.parametrize("kind", KINDS)
def test_direct_reads_that_are_not_aligned_are_right_or_refused(
    disks: MountedDisks, kind: str
) -> None:
    disk = disks.disk(kind)
    for name in ("page", "large"):
        content = disk.contents[disk.path(name)]
        with opened(disks.seen(disk.path(name)), os.O_RDONLY | os.O_DIRECT) as fd:
            for offset, count in ((1, 100), (511, 5000), (4096, 3)):
                buffer, got = bytearray(count), -1
                with may_refuse(errno.EINVAL):
                    got = os.preadv(fd, [buffer], offset)
                assert got == -1 or buffer[:got] == content.slice(offset, count)


@pytest.mark.parametrize("kind", KINDS)
def test_reads_that_must_not_wait_are_right_or_refused(disks: MountedDisks, kind: str) -> None:
    """A short answer is a part from the front; refusals are those of any file system."""
    disk = disks.disk(kind)
    disk.forget(disks.node.mountpoint)
    for name in ("page", "large"):
        content = disk.contents[disk.path(name)]
        with opened(disks.seen(disk.path(name))) as fd:
            for _ in range(2):  # cold, then warm
                buffer, got = bytearray(MIB), -1
                with may_refuse(errno.EAGAIN, errno.EOPNOTSUPP):
                    got = os.preadv(fd, [buffer], 100, os.RWF_NOWAIT)
                assert got == -1 or (got > 0 and buffer[:got] == content.slice(100, got))
                assert os.pread(fd, MIB, 100) == content.slice(100, MIB)


@pytest.mark.parametrize("kind", KINDS)
def test_copy_file_range_out_of_the_mount_is_right_or_refused(
    disks: MountedDisks, kind: str
) -> None:
    disk = disks.disk(kind)
    for name in ("page", "large"):
        content = disk.contents[disk.path(name)]
        target = disk.root / f"copy-{name}"
        with opened(disks.seen(disk.path(name))) as source, target.open("w+b") as sink:
            copied, left = 0, content.size
            with may_refuse(errno.EXDEV, errno.EOPNOTSUPP):
                while count := os.copy_file_range(source, sink.fileno(), MIB):
                    copied += count
                left = 0
            assert left == 0 or copied == 0
            assert sink.read() == content.slice(0, content.size - left)
        target.unlink()


BEYOND_THE_END = """
import ctypes, mmap, os, sys
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
fd = os.open(sys.argv[1], os.O_RDONLY)
at = libc.mmap(None, 1 << 16, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
print(ctypes.string_at(at + 4096, 2), flush=True)
ctypes.string_at(at + 8192, 1)
"""


@pytest.mark.parametrize("kind", KINDS)
def test_a_mapping_ends_with_the_file(disks: MountedDisks, kind: str, tmp_path: Path) -> None:
    """Zeros to the end of the last page, and behind it the signal of any file system."""
    disk = disks.disk(kind)
    clients = Clients(tmp_path)
    try:
        path = str(disks.seen(disk.path("page")))
        done = clients.run(sys.executable, "-c", BEYOND_THE_END, path, patience=PATIENCE)
        last = disk.contents[disk.path("page")].slice(4096, 1) + b"\0"
        assert (done.stdout, done.returncode) == (f"{last!r}\n", -signal.SIGBUS), done.stderr
    finally:
        clients.kill()
        clients.reap()


def test_the_model_of_a_sparse_file_agrees_with_itself() -> None:
    content = Content(100, {10: b"abc", 98: b"yz"})
    assert content.slice(9, 5) == b"\0abc\0"
    assert content.slice(11, 1) == b"b"
    assert content.slice(97, 50) == b"\0yz"
    assert content.slice(100, 5) == content.slice(200, 5) == b""
