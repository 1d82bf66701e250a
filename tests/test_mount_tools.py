"""Programs that people use on sector files find nothing to complain of in the mount.

On ext4, xfs, btrfs and tmpfs, with and without the extension for the kernel. What writes data (fio)
writes to the disk; what checks it reads through the mount. Every program runs in a process that the
test outlives.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

from tests.file_systems import KINDS
from tests.mount_clients import Clients
from tests.tools_fixtures import (
    ISLANDS,
    MIB,
    PATIENCE,
    SIZES,
    WAYS,
    Disk,
    MountedDisks,
    mounted_disks,
)

pytestmark = pytest.mark.mount

VERIFIED, SMALL, DAMAGED = range(len(SIZES), len(SIZES) + 3)
"""Steps of the sectors with fio's data; one block of the last one is damaged."""
FIO_SIZES = {VERIFIED: 8 * MIB, SMALL: MIB // 2, DAMAGED: 2 * MIB}
FIO = (
    *("fio", "--output-format=terse", "--thread", "--bs=16k"),
    *("--verify=crc32c", "--verify_state_save=0"),
)


def write_fio(disk: Disk) -> None:
    """Data that fio knows again, below the mount."""
    jobs = [fio_job(disk.root, disk, step, "write") for step in FIO_SIZES]
    command = [*FIO, "--do_verify=0", "--end_fsync=1", *chain.from_iterable(jobs)]
    subprocess.run(command, check=True, capture_output=True)
    with (disk.root / disk.own("sealed", DAMAGED)).open("r+b") as stream:
        stream.seek(MIB + 5000)
        stream.write(b"rot")


def fio_job(root: Path, disk: Disk, step: int, order: str) -> list[str]:
    """The part of a command that names a file and what to do with it."""
    path = root / disk.own("sealed", step)
    name = f"--name={disk.kind}-{step}-{order}"
    return [name, f"--filename={path}", f"--size={FIO_SIZES[step]}", f"--rw={order}"]


@pytest.fixture(scope="module", params=WAYS)
def disks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MountedDisks]:
    root = tmp_path_factory.mktemp("tools")
    with mounted_disks(root, request.param, fill=write_fio) as found:
        for disk in found.disks.values():
            for step in FIO_SIZES:
                found.wait_for(disk.own("sealed", step))
        yield found


@pytest.fixture
def clients(tmp_path: Path) -> Iterator[Clients]:
    found = Clients(tmp_path)
    yield found
    found.kill()
    found.reap()


def said(clients: Clients, *command: str | Path) -> str:
    """What a program prints that must succeed."""
    done = clients.run(*map(str, command), patience=PATIENCE)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


# --- fio ---

ENGINES = {
    "psync": (),
    "pvsync2": (),
    "mmap": (),
    "splice": (),
    "posixaio": ("--iodepth=8",),
    "libaio": ("--iodepth=8",),
    "libaio, direct": ("--iodepth=8", "--direct=1"),
    "io_uring": ("--iodepth=8",),
    "io_uring, direct": ("--iodepth=8", "--direct=1"),
}


@pytest.mark.parametrize("engine", ENGINES)
def test_fio_verifies_what_it_wrote_below(
    disks: MountedDisks, clients: Clients, engine: str
) -> None:
    """All disks at once, each in order and at random, small files and large ones."""
    options = ["--readonly", f"--ioengine={engine.split(',')[0]}", *ENGINES[engine]]
    jobs: list[str] = []
    for disk in disks.disks.values():
        disk.forget(disks.node.mountpoint)
        for step, order in ((VERIFIED, "read"), (VERIFIED, "randread"), (SMALL, "randread")):
            jobs += fio_job(disks.node.mountpoint, disk, step, order)
    said(clients, *FIO, *options, *jobs)


@pytest.mark.parametrize("kind", KINDS)
def test_fio_sees_damage_through_the_mount(
    disks: MountedDisks, clients: Clients, kind: str
) -> None:
    """So what it verifies above is looked at."""
    job = fio_job(disks.node.mountpoint, disks.disk(kind), DAMAGED, "read")
    done = clients.run(*FIO, "--readonly", *job, patience=PATIENCE)
    assert done.returncode != 0
    assert "crc32c" in done.stdout + done.stderr


# --- xfs_io ---

# It looks at every mount of the machine when it starts, and one that hangs would hold it up: so it
# sees none.
XFS_IO = (
    *("unshare", "--mount", "bash", "-ec"),
    'mount -t tmpfs none /proc; touch /proc/mounts; exec xfs_io "$@"',
    "xfs_io",
)


def xfs_io(clients: Clients, path: Path, *commands: str, flags: str = "-r") -> str:
    """What xfs_io shows, without times and paths."""
    options = chain.from_iterable(("-c", command) for command in commands)
    shown = said(clients, *XFS_IO, *flags.split(), *options, path)
    kept = [line for line in shown.splitlines() if "ops;" not in line and "fd.path" not in line]
    return "\n".join(kept)


SHOWN = {
    "pread": ("-r", ("pread -v 0 100", "pread -v 4090 70", "pread -b 4k 0 1m")),
    "pread backwards": ("-r", ("pread -B -b 4k 0 1m",)),
    "pread vectored": ("-r", ("pread -v -V 8 -b 512 0 9000",)),
    "pread direct": ("-r -d", ("pread -v -b 4096 4096 4096", "pread -b 64k 0 1m")),
    "mread": ("-r", ("mmap -r 0 8192", "mread -v 0 200", "mread -v 4000 190")),
    "mread backwards": ("-r", ("mmap -r 0 1m", "mread -v -r 0 20000")),
    "hints": (
        "-r",
        ("fadvise -s", "fadvise -r", "fadvise -w 0 1m", "pread -v 0 64", "fadvise -d 0 1m"),
    ),
    "the end": ("-r", ("pread -v 5242870 4096", "pread -v 5242883 4096", "pread -v 9m 4096")),
    "the end, direct": ("-r -d", ("pread -b 4096 5242880 4096", "pread -b 4096 8m 4096")),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("work", SHOWN)
def test_xfs_io_shows_the_same_as_on_the_disk(
    disks: MountedDisks, clients: Clients, work: str, kind: str
) -> None:
    disk = disks.disk(kind)
    disk.forget(disks.node.mountpoint)
    flags, commands = SHOWN[work]
    for relative in (disk.path("large"), disk.member):
        seen = xfs_io(clients, disks.seen(relative), *commands, flags=flags)
        assert seen == xfs_io(clients, disk.root / relative, *commands, flags=flags)
        assert seen


@pytest.mark.parametrize("kind", KINDS)
def test_xfs_io_far_out_in_a_sparse_file(disks: MountedDisks, clients: Clients, kind: str) -> None:
    disk = disks.disk(kind)
    places = [place for start in ISLANDS for place in (start // 4096 * 4096, start)]
    reads = [f"pread -v {place} 64" for place in places]
    maps = [
        command
        for place in places[::2]
        for command in (f"mmap -r {place} 8192", f"mread -v {place} 4096", "munmap")
    ]
    for commands in (reads, maps):
        seen = xfs_io(clients, disks.seen(disk.sparse), *commands)
        assert seen == xfs_io(clients, disk.root / disk.sparse, *commands)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["page", "large"])
def test_xfs_io_copies_out_of_the_mount(
    disks: MountedDisks, clients: Clients, kind: str, name: str
) -> None:
    disk = disks.disk(kind)
    path, size = disks.seen(disk.path(name)), SIZES[name]
    target = disk.root / "sent"
    said(clients, *XFS_IO, "-f", "-c", f"sendfile -i {path} 0 {size}", target)
    said(clients, "cmp", path, target)
    target.unlink()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", ["pwrite 0 1", "truncate 0", "falloc 0 1m", "fpunch 0 4k"])
def test_xfs_io_changes_nothing(
    disks: MountedDisks, clients: Clients, kind: str, command: str
) -> None:
    disk = disks.disk(kind)
    path = disks.seen(disk.path("large"))
    done = clients.run(*XFS_IO, "-c", command, str(path), patience=PATIENCE)
    assert "Read-only file system" in done.stderr
    assert done.returncode == 1


# --- copies, archives, comparisons ---

EACH = 'mkdir "$T"; for f in $(ls "$F"); do {}; done'
COPIES = {
    "cp": 'cp -r "$F" "$T"',
    "cp with times": 'cp -a "$F" "$T"',
    "cp making holes": 'cp -r --sparse=always "$F" "$T"',
    "cp without holes": 'cp -r --sparse=never "$F" "$T"',
    "cp sharing blocks": 'cp -r --reflink=auto "$F" "$T"',
    "cat": EACH.format('cat "$F/$f" > "$T/$f"'),
    "dd": EACH.format('dd if="$F/$f" of="$T/$f" bs=1M'),
    "dd direct": EACH.format('dd if="$F/$f" of="$T/$f" bs=64k iflag=direct'),
    "head and tail": EACH.format('(head -c 5000; cat) < "$F/$f" > "$T/$f"'),
    "tar": 'mkdir "$T"; tar -C "$F" -cf - . | tar -C "$T" -xf -',
    "tar with holes": 'mkdir "$T"; tar -C "$F" -Scf - . | tar -C "$T" -xf -',
    "rsync": 'rsync -a "$F/" "$T"',
    "rsync over another": 'cp -r "$F" "$T"; echo x > "$T/p_aux"; rsync -ac "$F/" "$T"',
}
CHECKS = (
    'diff -rq "$F" "$T"',
    'diff -rq "$B" "$T"',
    'cd "$F"; for f in *; do cmp "$f" "$B/$f"; done',
    'cd "$F"; sha256sum * > "$T.sums"; cd "$B"; sha256sum --quiet -c "$T.sums"',
    'cd "$B"; md5sum * > "$T.sums"; cd "$F"; md5sum --quiet -c "$T.sums"',
    'test -z "$(rsync -rcn --itemize-changes "$F/" "$T")"',
    'tar -C "$B" --mode=a=rX -cf - . | tar -C "$F" -df -',
)


def bash(clients: Clients, script: str, disks: MountedDisks, disk: Disk) -> str:
    """A script with the sector directory in the mount ($F), below ($B), and a target ($T)."""
    names = f"F={disks.seen(disk.folder)} B={disk.root / disk.folder} T={disk.root / 'copy'}"
    return said(clients, "bash", "-euo", "pipefail", "-c", f"{names}; {script}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("work", COPIES)
def test_a_copy_is_the_original(
    disks: MountedDisks, clients: Clients, work: str, kind: str
) -> None:
    disk = disks.disk(kind)
    disk.forget(disks.node.mountpoint)
    try:
        bash(clients, COPIES[work], disks, disk)
        bash(clients, 'diff -rq "$B" "$T"', disks, disk)
    finally:
        shutil.rmtree(disk.root / "copy", ignore_errors=True)


@pytest.mark.parametrize("kind", KINDS)
def test_programs_that_compare_find_no_difference(
    disks: MountedDisks, clients: Clients, kind: str
) -> None:
    disk = disks.disk(kind)
    copy = disk.root / "copy"
    try:
        bash(clients, 'cp -r "$B" "$T"', disks, disk)
        for check in CHECKS:
            disk.forget(disks.node.mountpoint)
            bash(clients, check, disks, disk)
        (copy / "p_aux").write_bytes(b"other")
        with pytest.raises(AssertionError):
            bash(clients, CHECKS[0], disks, disk)
    finally:
        shutil.rmtree(copy, ignore_errors=True)


@pytest.mark.parametrize("kind", KINDS)
def test_times_and_sizes_are_kept_by_those_who_keep_them(
    disks: MountedDisks, clients: Clients, kind: str
) -> None:
    disk = disks.disk(kind)
    keepers = ("cp with times", "tar", "rsync")
    for work in keepers:
        try:
            bash(clients, COPIES[work], disks, disk)
            for path in (disk.root / disk.folder).iterdir():
                copied, original = (disk.root / "copy" / path.name).stat(), path.stat()
                # The format of a tar archive has whole seconds only.
                assert copied.st_mtime_ns // 10**9 == original.st_mtime_ns // 10**9
                assert copied.st_size == original.st_size
            differs = (
                'rsync -an --no-p --no-o --no-g --itemize-changes "$F/" "$B" | grep ^.f || true'
            )
            assert bash(clients, differs, disks, disk) == ""
        finally:
            shutil.rmtree(disk.root / "copy", ignore_errors=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "command",
    [
        ("cp", "--reflink=always", "{}", "{}.copy"),
        ("lsattr", "{}"),
        ("rm", "-f", "{}"),
        ("touch", "{}"),
        ("sed", "-i", "s/a/b/", "{}"),
    ],
    ids=lambda command: command[0],
)
def test_what_cannot_be_done_is_refused_and_hurts_nothing(
    disks: MountedDisks, clients: Clients, command: tuple[str, ...], kind: str
) -> None:
    disk = disks.disk(kind)
    path = disks.seen(disk.path("large"))
    done = clients.run(*(part.format(path) for part in command), patience=PATIENCE)
    assert done.returncode != 0
    said(clients, "cmp", path, disk.root / disk.path("large"))


def test_the_way_that_was_asked_for_is_taken(disks: MountedDisks) -> None:
    """Without this, one way could be tested twice and the other never."""
    ways = set()
    for disk in disks.disks.values():
        with disks.seen(disk.path("large")).open("rb") as stream:
            stream.read(1)
            way = os.getxattr(disks.seen(disk.path("large")), "user.sectorfs.read_path").decode()
        ways.add(way)
        small = os.getxattr(disks.seen(disk.path("small")), "user.sectorfs.read_path").decode()
        assert small == "daemon"
    assert ways == {"daemon" if disks.node.environment else "passthrough"}
