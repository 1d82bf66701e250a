"""The extension between libfuse and the kernel: layouts, marks, limits, remembered files."""

from __future__ import annotations

import errno
import mmap
import os
import random
import signal
import subprocess
import sysconfig
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pyfuse3
import pytest
import trio
import trio.lowlevel
from prometheus_client import REGISTRY

from sectorfs.fuse import kernel, mounts
from tests.bare_mount import HANDLES, bare_mount
from tests.mount_fixtures import World, call, eventually

pytestmark = pytest.mark.mount

SOURCES = Path(kernel.__file__).parent
PARTS = ("_kernel.c", "_channel.c", "_kept.c", "_interrupts.c")
HEADER = Path("/usr/include/linux/fuse.h")

SIZES = {
    "request_header": (40, "fuse_in_header"),
    "reply_header": (16, "fuse_out_header"),
    "init_request": (64, "fuse_init_in"),
    "init_reply": (64, "fuse_init_out"),
    "open_request": (8, "fuse_open_in"),
    "open_reply": (16, "fuse_open_out"),
    "read_request": (40, "fuse_read_in"),
    "release_request": (24, "fuse_release_in"),
}
PLACES = {
    ("request_header", "opcode"): (4, "opcode"),
    ("request_header", "unique"): (8, "unique"),
    ("request_header", "node"): (16, "nodeid"),
    ("request_header", "pid"): (32, "pid"),
    ("reply_header", "error"): (4, "error"),
    ("reply_header", "unique"): (8, "unique"),
    ("init_request", "flags"): (12, "flags"),
    ("init_request", "flags2"): (16, "flags2"),
    ("init_reply", "flags"): (12, "flags"),
    ("init_reply", "max_background"): (16, "max_background"),
    ("init_reply", "congestion_threshold"): (18, "congestion_threshold"),
    ("init_reply", "max_write"): (20, "max_write"),
    ("init_reply", "max_pages"): (28, "max_pages"),
    ("init_reply", "flags2"): (32, "flags2"),
    ("init_reply", "max_stack_depth"): (36, "max_stack_depth"),
    ("open_request", "flags"): (0, "flags"),
    ("open_reply", "handle"): (0, "fh"),
    ("open_reply", "flags"): (8, "open_flags"),
    ("open_reply", "backing"): (12, "backing_id"),
    ("release_request", "handle"): (0, "fh"),
    ("read_request", "flags"): (32, "flags"),
}
NUMBERS = {
    "FORGET": (2, "FUSE_FORGET"),
    "OPEN": (14, "FUSE_OPEN"),
    "READ": (15, "FUSE_READ"),
    "RELEASE": (18, "FUSE_RELEASE"),
    "INIT": (26, "FUSE_INIT"),
    "OPENDIR": (27, "FUSE_OPENDIR"),
    "INTERRUPT": (36, "FUSE_INTERRUPT"),
    "NOTIFY_REPLY": (41, "FUSE_NOTIFY_REPLY"),
    "BATCH_FORGET": (42, "FUSE_BATCH_FORGET"),
    "HAS_MORE_FLAGS": (1 << 30, "FUSE_INIT_EXT"),
    "PASSTHROUGH": (1 << 5, "(FUSE_PASSTHROUGH >> 32)"),
    "ASYNC_DIRECT": (1 << 15, "FUSE_ASYNC_DIO"),
    "WRITEBACK_CACHE": (1 << 16, "FUSE_WRITEBACK_CACHE"),
    "OPEN_KEEP_CACHE": (1 << 1, "FOPEN_KEEP_CACHE"),
    "OPEN_CACHE_DIRECTORY": (1 << 3, "FOPEN_CACHE_DIR"),
    "OPEN_PASSTHROUGH": (1 << 7, "FOPEN_PASSTHROUGH"),
    "OPEN_BACKING": (0x4010E501, "FUSE_DEV_IOC_BACKING_OPEN"),
    "CLOSE_BACKING": (0x4004E502, "FUSE_DEV_IOC_BACKING_CLOSE"),
}
SINCE_PASSTHROUGH = {"backing_id", "max_stack_depth"}
"""Fields that headers before Linux 6.9 name otherwise."""

needs_extension = pytest.mark.skipif(not kernel.prepare(), reason="the extension is left out")


def compiles(directory: Path, text: str, *options: str) -> None:
    """The compiler finds nothing wrong with a text."""
    source = directory / "text.c"
    source.write_text(text)
    include = [f"-I{SOURCES}", f"-I{sysconfig.get_paths()['include']}"]
    command = ["gcc", "-O2", "-c", "-o", os.devnull, "-Wall", "-Wextra", "-Werror"]
    done = subprocess.run(
        [*command, *options, *include, str(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("part", PARTS)
def test_the_compiler_has_nothing_to_say(tmp_path: Path, part: str) -> None:
    compiles(tmp_path, f'#include "{part}"\n')


def asserts(claims: list[str]) -> str:
    return "".join(f'_Static_assert({claim}, "layout");\n' for claim in claims)


def test_layouts_are_those_of_the_protocol(tmp_path: Path) -> None:
    claims = [f"sizeof(struct {name}) == {size}" for name, (size, _) in SIZES.items()]
    claims += [
        f"offsetof(struct {name}, {field}) == {place}"
        for (name, field), (place, _) in PLACES.items()
    ]
    claims += [f"(unsigned long){name} == {number}" for name, (number, _) in NUMBERS.items()]
    compiles(tmp_path, f'#include <stddef.h>\n#include "_wire.h"\n{asserts(claims)}')


@pytest.mark.skipif(not HEADER.exists(), reason="linux-libc-dev is not installed")
def test_layouts_are_those_of_the_kernels_header(tmp_path: Path) -> None:
    known = HEADER.read_text()
    theirs = {name: other for name, (_, other) in SIZES.items()}
    claims = [f"sizeof(struct {name}) == sizeof(struct {other})" for name, other in theirs.items()]
    claims += [
        f"offsetof(struct {name}, {field}) == offsetof(struct {theirs[name]}, {other})"
        for (name, field), (_, other) in PLACES.items()
        if other not in SINCE_PASSTHROUGH or "FUSE_PASSTHROUGH" in known
    ]
    claims += [
        f"(unsigned long){name} == {other}"
        for name, (_, other) in NUMBERS.items()
        if other.strip("()").split(" ")[0] in known
    ]
    includes = '#include <stddef.h>\n#include "_wire.h"\n#include <linux/fuse.h>\n'
    compiles(tmp_path, includes + asserts(claims), "-Wno-enum-compare")


# What is offered


@needs_extension
async def test_the_kernel_grants_what_the_introduction_asks_for(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.mounted():
        offer = kernel.offer()
        mount = mounts.find_mount(world.mountpoint)
        assert mount is not None
        connection = mounts.connection(mount.minor)
    assert offer.interrupts
    assert offer.cached_directories
    assert offer.passthrough, offer.reason
    assert connection is not None
    assert not kernel.offer().passthrough, "the mount has gone"


@needs_extension
async def test_opens_without_python_are_a_metric(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.store.proved = True
    world.put("sealed/7", DATA)
    async with world.mounted():
        for _ in range(3):
            assert await call(world.seen("sealed/7").read_bytes) == DATA
        assert REGISTRY.get_sample_value("sectorfs_fuse_kept_opens") == 2


@needs_extension
async def test_the_introduction_sets_the_kernels_bounds(directory: Path) -> None:
    async with bare_mount(directory) as (_, mountpoint):
        mount = mounts.find_mount(mountpoint)
        assert mount is not None
        connection = mounts.connection(mount.minor)
        assert connection is not None
        bound, congestion = (
            int((connection / name).read_text())
            for name in ("max_background", "congestion_threshold")
        )
    assert bound == mounts.MAX_BACKGROUND
    assert congestion == mounts.MAX_BACKGROUND * 3 // 4


async def test_without_a_mount_the_answer_is_no() -> None:
    offer = kernel.offer()
    assert (offer.passthrough, offer.interrupts, offer.cached_directories) == (False,) * 3
    assert offer.reason
    kernel.mark_open(1, cache_directory=True)
    assert not kernel.remember(1, 1, 0)
    assert kernel.forget(1) == 0
    assert kernel.use(1) is None
    assert kernel.opens() == 0
    assert kernel.current() == (0, 0, False)
    assert kernel.interrupts_fd() == -1
    assert kernel.interrupted() == []
    with pytest.raises(OSError, match=r"extension|device"):
        kernel.open_backing(0)
    with pytest.raises(OSError, match=r"extension|device"):
        kernel.close_backing(1)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ((0, False, False, False), "no mount"),
        ((1, False, False, False), "introduced"),
        ((1, True, False, False), "Linux 6.9"),
        ((1, True, True, False), "writeback"),
    ],
)
def test_an_offer_says_what_is_missing(facts: tuple[int, bool, bool, bool], reason: str) -> None:
    offer = kernel.judge(facts, lambda: "")
    assert not offer.passthrough
    assert reason in offer.reason


def test_an_offer_says_why_the_kernel_refuses() -> None:
    facts = (1, True, True, True)
    assert kernel.judge(facts, lambda: "") == kernel.Offer(True, True, True, "")
    offer = kernel.judge(facts, lambda: "no privilege")
    assert offer == kernel.Offer(False, True, True, "no privilege")


# Opens that are answered without Python


NAMES = [f"{letter}" for letter in "abcdefgh"]
DATA = bytes(range(256)) * 32


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Files for a bare mount."""
    directory = tmp_path / "files"
    directory.mkdir()
    for name in NAMES:
        (directory / name).write_bytes(DATA)
    return directory


@contextmanager
def kept(path: Path) -> Iterator[int]:
    """A descriptor of a file, as the daemon keeps one."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def read_small(path: Path) -> bytes:
    """With no more calls than these: `open` of Python asks for a terminal, which is a request."""
    fd = opened(path)
    try:
        return os.read(fd, 1 << 20)
    finally:
        os.close(fd)


def opened(path: Path, flags: int = 0) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)


@needs_extension
async def test_opens_and_releases_of_remembered_files_do_not_reach_python(directory: Path) -> None:
    async with bare_mount(directory) as (bare, mount):
        number = bare.number("a")
        with kept(directory / "a") as fd:
            first = await call(lambda: opened(mount / "a"))
            assert kernel.remember(number, number + HANDLES, fd)
            assert not kernel.remember(number, number + HANDLES, fd), "it is already"
            assert await call((mount / "a").read_bytes) == DATA
            second = await call(lambda: opened(mount / "a"))
            await eventually(lambda: _open(number) == 1)
            await call(lambda: os.close(first))  # whose open Python saw: they are all the same
            await eventually(lambda: _open(number) == 0)
            await call(lambda: os.close(second))
            await eventually(lambda: bare.released[number] == 1)
            use = kernel.use(number)
            assert use is not None
            assert use.opens == kernel.opens() == 2
            assert use.idle < 60
            assert kernel.forget(number) == 0
        assert await call((mount / "a").read_bytes) == DATA
        assert bare.asked["open"] == 2


def _open(number: int) -> int:
    use = kernel.use(number)
    assert use is not None
    return use.open


@needs_extension
async def test_what_is_open_when_a_file_is_forgotten_is_released_in_python(
    directory: Path,
) -> None:
    async with bare_mount(directory) as (bare, mount):
        number = bare.number("b")
        with kept(directory / "b") as fd:
            assert kernel.remember(number, number + HANDLES, fd)
            await call((mount / "b").stat)
            fds = [await call(lambda: opened(mount / "b")) for _ in range(3)]
            await call(lambda: os.close(fds[0]))
            await eventually(lambda: _open(number) == 2)
            assert kernel.forget(number) == 2
            assert kernel.use(number) is None
        assert await call(lambda: os.pread(fds[1], 3, 256)) == DATA[256:259], "the handle stays"
        assert bare.released[number] == 0
        for fd in fds[1:]:
            await call(partial(os.close, fd))
        await eventually(lambda: bare.released[number] == 2)


@needs_extension
@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.unlink(),
        lambda path: path.chmod(0o400),
        lambda path: (
            path.with_name("new").write_bytes(b"new") and path.with_name("new").replace(path)
        ),
        lambda path: os.truncate(path, 5),
        lambda path: os.utime(path, (1, 1)),
        lambda path: os.link(path, path.with_name("other")),
    ],
    ids=["removed", "mode", "replaced", "shorter", "times", "linked"],
)
async def test_a_file_that_is_not_the_same_any_more_is_pythons(
    directory: Path, change: Callable[[Path], object]
) -> None:
    path = directory / "a"
    async with bare_mount(directory) as (bare, mount):
        number = bare.number("a")
        with kept(path) as fd:
            assert kernel.remember(number, number + HANDLES, fd)
            await call(lambda: os.close(opened(mount / "a")))
            assert bare.asked["open"] == 0
            change(path)
            await call(lambda: os.close(opened(mount / "a")))
            assert bare.asked["open"] == 1
            assert kernel.opens() == 1


@needs_extension
async def test_a_descriptor_that_is_closed_or_no_file_is_remembered_in_vain(
    directory: Path,
) -> None:
    async with bare_mount(directory) as (bare, mount):
        number = bare.number("a")
        with kept(directory / "a") as fd:
            assert kernel.remember(number, number + HANDLES, fd)
        await call(lambda: os.close(opened(mount / "a")))
        assert bare.asked["open"] == 1
        assert not kernel.remember(number + 1, number + HANDLES, fd)
        assert not kernel.remember(number + 1, number + HANDLES, -1)


@needs_extension
@pytest.mark.parametrize(
    ("flags", "asked"),
    [(os.O_NOFOLLOW | os.O_NONBLOCK, 0), (os.O_DIRECT, 1), (os.O_NOATIME, 1), (os.O_SYNC, 1)],
    ids=["plain", "direct", "noatime", "sync"],
)
async def test_only_plain_opens_are_answered(directory: Path, flags: int, asked: int) -> None:
    async with bare_mount(directory) as (bare, mount):
        number = bare.number("a")
        with kept(directory / "a") as fd:
            assert kernel.remember(number, number + HANDLES, fd)
            await call(lambda: os.close(opened(mount / "a", flags)))
            assert bare.asked["open"] == asked


@needs_extension
async def test_a_busy_loop_holds_up_no_open_of_a_remembered_file(directory: Path) -> None:
    async with bare_mount(directory) as (bare, mount):
        number = bare.number("a")
        with kept(directory / "a") as fd:
            assert kernel.remember(number, number + HANDLES, fd)
            assert await call(lambda: read_small(mount / "a")) == DATA
            seen: list[bytes] = []
            reader = threading.Thread(target=lambda: seen.append(read_small(mount / "a")))
            reader.start()
            reader.join(20)  # and meanwhile nothing else runs on the loop
            assert seen == [DATA]


@needs_extension
async def test_every_open_has_one_release_however_files_come_and_go(directory: Path) -> None:
    """Threads open and close, while files are remembered and forgotten under them."""
    rounds, threads = 200, 16
    forgotten: Counter[int] = Counter()

    def use_files(mount: Path, seed: int) -> None:
        choose = random.Random(seed)
        with ExitStack() as stack:
            for _ in range(rounds):
                fd = opened(mount / choose.choice(NAMES))
                if choose.random() < 0.3:
                    stack.callback(os.close, fd)
                else:
                    assert os.pread(fd, 4, 4) == DATA[4:8]
                    os.close(fd)

    async with bare_mount(directory) as (bare, mount):
        with ExitStack() as stack:
            fds = {bare.number(name): stack.enter_context(kept(directory / name)) for name in NAMES}
            choose = random.Random(7)
            async with trio.open_nursery() as nursery:
                for seed in range(threads):
                    nursery.start_soon(call, partial(use_files, mount, seed))
                while len(nursery.child_tasks) > 0:
                    number = choose.choice(list(fds))
                    if not kernel.remember(number, number + HANDLES, fds[number]):
                        forgotten[number] += kernel.forget(number)
                    await trio.lowlevel.checkpoint()
            await eventually(lambda: not any(map(_still_open, fds)), 20)
            for number in fds:
                assert kernel.forget(number) == 0
        by_python = bare.asked["open"] + sum(forgotten.values())
        await eventually(lambda: bare.asked["release"] == by_python, 20)
        assert bare.asked["open"] + kernel.opens() == rounds * threads
        assert kernel.opens() > 0


def _still_open(number: int) -> int:
    use = kernel.use(number)
    return use.open if use else 0


# Marks


def read_and_map(path: Path) -> tuple[bytes, bytes]:
    with path.open("rb") as file:
        with mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ) as view:
            return file.read(), view[:]


@needs_extension
@pytest.mark.parametrize("remembered", [False, True])
async def test_a_file_with_a_backing_id_is_read_past_the_daemon(
    directory: Path, remembered: bool
) -> None:
    async with bare_mount(directory) as (bare, mount):
        number = bare.number("c")
        with kept(directory / "c") as fd:
            backing = bare.backing[number] = kernel.open_backing(fd)
            if remembered:
                assert kernel.remember(number, number + HANDLES, fd, backing_id=backing)
            assert await call(lambda: read_and_map(mount / "c")) == (DATA, DATA)
            kernel.close_backing(backing)
        assert bare.asked["read"] == 0
        assert bare.asked["open"] == (0 if remembered else 1)
        assert await call((mount / "d").read_bytes) == DATA
        assert bare.asked["read"] > 0, "marks are for one handle"


@needs_extension
async def test_the_kernel_refuses_a_file_of_the_mount_itself(directory: Path) -> None:
    async with bare_mount(directory) as (_, mount):
        fd = await call(lambda: opened(mount / "a"))
        with pytest.raises(OSError) as refusal:  # noqa: PT011  # the number is what counts
            kernel.open_backing(fd)
        assert refusal.value.errno == errno.ELOOP
        await call(lambda: os.close(fd))
        with pytest.raises(OSError) as refusal:  # noqa: PT011
            kernel.open_backing(-1)
        assert refusal.value.errno == errno.EBADF
        with pytest.raises(OSError) as refusal:  # noqa: PT011
            kernel.close_backing(4711)
        assert refusal.value.errno == errno.ENOENT


@needs_extension
@pytest.mark.parametrize("cached", [False, True])
async def test_a_listing_is_kept_when_its_open_is_marked(directory: Path, cached: bool) -> None:
    async with bare_mount(directory) as (bare, mount):
        bare.cache_directories = cached
        assert sorted(await call(partial(os.listdir, mount))) == NAMES
        before = bare.asked["readdir"]
        assert sorted(await call(partial(os.listdir, mount))) == NAMES
        assert (bare.asked["readdir"] == before) is cached


@needs_extension
async def test_requests_are_as_large_as_a_mebibyte(directory: Path) -> None:
    size = 4 << 20
    (directory / "a").write_bytes(bytes(size))

    def read_directly(path: Path) -> int:
        fd = opened(path, os.O_DIRECT)
        try:
            with mmap.mmap(-1, size) as buffer:
                return os.preadv(fd, [buffer], 0)
        finally:
            os.close(fd)

    async with bare_mount(directory) as (bare, mount):
        assert await call(lambda: read_directly(mount / "a")) == size
        assert bare.largest_read == 1 << 20


# The thread


@needs_extension
async def test_more_requests_than_the_queue_holds_are_all_answered(tmp_path: Path) -> None:
    """The loop is held up until thousands of reads wait; the kernel keeps what is too much."""
    count = 5000
    directory = tmp_path / "many"
    directory.mkdir()
    for number in range(count):
        (directory / f"{number:04}").write_bytes(b"%04d" % number)
    async with bare_mount(directory) as (bare, mount):
        found = mounts.find_mount(mount)
        assert found is not None
        connection = mounts.connection(found.minor)
        assert connection is not None
        (connection / "max_background").write_text("10000")
        names = sorted(await call(partial(os.listdir, mount)))
        fds = [await call(partial(opened, mount / name)) for name in names]
        asker = threading.Thread(target=lambda: [_read_ahead(fd) for fd in fds])
        asker.start()
        asker.join(60)
        assert int((connection / "waiting").read_text()) >= count
        assert bare.asked["read"] == 0
        for name, fd in zip(names, fds, strict=True):
            assert await call(partial(os.pread, fd, 10, 0)) == name.encode()
        await call(lambda: [os.close(fd) for fd in fds])
        assert bare.asked["read"] >= count


def _read_ahead(fd: int) -> None:
    os.posix_fadvise(fd, 0, 4096, os.POSIX_FADV_WILLNEED)


def _tasks() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/task")}


@needs_extension
async def test_the_thread_takes_no_signals(directory: Path) -> None:
    before = _tasks()
    async with bare_mount(directory):
        (tid,) = _own(_tasks() - before)
        blocked = _blocked_signals(tid)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGUSR1):
        assert blocked & 1 << (number - 1)


@needs_extension
async def test_a_mount_leaves_no_thread_and_no_descriptor(directory: Path) -> None:
    async with bare_mount(directory):
        pass  # what is made once is there now
    tasks, fds = _tasks(), set(os.listdir("/proc/self/fd"))
    for _ in range(10):
        async with bare_mount(directory) as (bare, mount):
            number = bare.number("a")
            with kept(directory / "a") as fd:
                kernel.remember(number, number + HANDLES, fd)
                assert await call((mount / "a").read_bytes) == DATA
            kernel.mark_open(12345, cache_directory=True)
    assert set(os.listdir("/proc/self/fd")) == fds
    await eventually(lambda: not _own(_tasks() - tasks))


def _blocked_signals(tid: int) -> int:
    status = Path(f"/proc/self/task/{tid}/status").read_text()
    return int(
        next(line for line in status.splitlines() if line.startswith("SigBlk")).split()[1], 16
    )


def _own(tids: set[int]) -> set[int]:
    """Those of the threads that are the extension's; trio keeps some of its own for a while."""
    own = set()
    for tid in tids:
        try:
            if Path(f"/proc/self/task/{tid}/comm").read_text() == "fuse-requests\n":
                own.add(tid)
        except OSError:
            continue
    return own


@needs_extension
async def test_an_aborted_connection_ends_everybody_and_itself(directory: Path) -> None:
    """In the middle of opens answered here and of others answered in Python."""
    errors: list[int | None] = []
    busy = threading.Semaphore(0)

    def use_files(path: Path) -> None:
        try:
            while True:
                os.close(opened(path))
                busy.release()
        except OSError as exc:
            errors.append(exc.errno)

    def wait_busy() -> None:
        for _ in range(500):
            assert busy.acquire(timeout=20)

    async with bare_mount(directory) as (bare, mount):
        found = mounts.find_mount(mount)
        assert found is not None
        with kept(directory / "a") as fd:
            assert kernel.remember(bare.number("a"), bare.number("a") + HANDLES, fd)
            async with trio.open_nursery() as nursery:
                for name in ("a", "b") * 4:
                    nursery.start_soon(call, partial(use_files, mount / name))
                await call(wait_busy)
                await call(partial(mounts.abort, found.minor))
    assert len(errors) == 8
    assert set(errors) <= {errno.ENOTCONN, errno.ECONNABORTED}


@needs_extension
def test_a_mount_whose_loop_never_ran_is_closed(tmp_path: Path, directory: Path) -> None:
    """With a request in the queue, and somebody who waits for it."""
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    kernel.prepare()
    pyfuse3.init(pyfuse3.Operations(), str(mountpoint), {"fsname=bare", "subtype=bare"})
    mount = mounts.find_mount(mountpoint)
    assert mount is not None
    connection = mounts.connection(mount.minor)
    assert connection is not None
    errors: list[int | None] = []

    def look() -> None:
        try:
            os.listdir(mountpoint)
        except OSError as exc:
            errors.append(exc.errno)

    thread = threading.Thread(target=look)
    thread.start()
    while int((connection / "waiting").read_text()) < 2:
        assert thread.is_alive()
    pyfuse3.close(unmount=True)
    thread.join(20)
    assert errors
    assert errors[0] in (errno.ENOTCONN, errno.ECONNABORTED)
    assert mounts.find_mount(mountpoint) is None
