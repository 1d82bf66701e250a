"""The extension between libfuse and the kernel: layouts, marks, limits, remembered files."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path

import pytest

from sectorfs.fuse import kernel
from tests.mount_fixtures import World, call

SOURCE = Path(kernel.__file__).with_name("_kernel.c")
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


def compiles(directory: Path, text: str) -> None:
    """The compiler finds nothing wrong with the extension followed by `text`."""
    source = directory / "layout.c"
    source.write_text(f'#include "{SOURCE}"\n{text}')
    command = ["gcc", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-Wno-enum-compare"]
    done = subprocess.run(
        [*command, f"-I{sysconfig.get_paths()['include']}", str(source)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_layouts_are_those_of_the_protocol(tmp_path: Path) -> None:
    asserts = [f"sizeof(struct {name}) == {size}" for name, (size, _) in SIZES.items()]
    asserts += [
        f"offsetof(struct {name}, {field}) == {place}"
        for (name, field), (place, _) in PLACES.items()
    ]
    asserts += [f"(unsigned long){name} == {number}" for name, (number, _) in NUMBERS.items()]
    compiles(tmp_path, "".join(f'_Static_assert({one}, "layout");\n' for one in asserts))


@pytest.mark.skipif(not HEADER.exists(), reason="linux-libc-dev is not installed")
def test_layouts_are_those_of_the_kernels_header(tmp_path: Path) -> None:
    theirs = {name: other for name, (_, other) in SIZES.items()}
    asserts = [f"sizeof(struct {name}) == sizeof(struct {other})" for name, other in theirs.items()]
    asserts += [
        f"offsetof(struct {name}, {field}) == offsetof(struct {theirs[name]}, {other})"
        for (name, field), (_, other) in PLACES.items()
        if other not in SINCE_PASSTHROUGH or "FUSE_PASSTHROUGH" in HEADER.read_text()
    ]
    asserts += [
        f"(unsigned long){name} == {other}"
        for name, (_, other) in NUMBERS.items()
        if other.strip("()").split(" ")[0] in HEADER.read_text()
    ]
    text = "".join(f'_Static_assert({one}, "layout");\n' for one in asserts)
    compiles(tmp_path, f"#include <linux/fuse.h>\n{text}")


@needs_extension
async def test_the_kernel_grants_what_the_introduction_asks_for(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.mounted():
        offer = kernel.offer()
    assert offer.interrupts
    assert offer.cached_directories
    assert offer.passthrough, offer.reason
    assert not kernel.offer().passthrough  # the mount has gone


async def test_without_a_mount_the_answer_is_no() -> None:
    offer = kernel.offer()
    assert (offer.passthrough, offer.interrupts, offer.cached_directories) == (False,) * 3
    assert offer.reason
    assert not kernel.remember(1, 1, 0)
    assert kernel.forget(1) == 0
    assert kernel.use(1) is None
    with pytest.raises(OSError, match=r"extension|device"):
        kernel.open_backing(0)
    with pytest.raises(OSError, match=r"extension|device"):
        kernel.close_backing(1)


@needs_extension
async def test_remembered_files_are_opened_without_python(tmp_path: Path) -> None:
    world = World(tmp_path)
    path = world.put("sealed/7", b"abc")
    async with world.mounted():
        with await call(lambda: world.seen("sealed/7").open("rb")) as first:
            number = (await call(lambda: os.fstat(first.fileno()))).st_ino
            opened = world.store.opened
            with opened[0].descriptor as fd:
                assert kernel.remember(number, 1, fd)
                assert not kernel.remember(number, 1, fd)  # already
                assert await call(world.seen("sealed/7").read_bytes) == b"abc"
                use = kernel.use(number)
                assert use is not None
                assert use.opens == kernel.opens() == 1
                assert len(opened) == 1
                path.chmod(0o600)  # its times change: whether it still is the same, Python says
                assert await call(world.seen("sealed/7").read_bytes) == b"abc"
                assert len(opened) == 2
                assert kernel.forget(number) == 0
