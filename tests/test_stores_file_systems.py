"""Which file systems count as local, asked of real ones."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sectorfs.config import TimeoutsConfig
from sectorfs.stores import file_systems
from sectorfs.stores.file_systems import FOREIGN_FOR, FileSystems, local_file_system, open_to_read
from sectorfs.stores.lanes import Lane
from sectorfs.stores.local_path import LocalPath
from sectorfs.stores.metadata import init_path
from tests.cluster_fixtures import mounted
from tests.file_systems import KINDS, file_system, why_not
from tests.hung_disk import hung_disk
from tests.mount_fixtures import open_descriptors, sector_file


@contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def name_of(path: Path) -> str:
    with opened(path) as fd:
        return local_file_system(fd)


@pytest.mark.mount
@pytest.mark.parametrize("kind", KINDS)
def test_local_file_systems_have_names(tmp_path: Path, kind: str) -> None:
    if reason := why_not(kind):
        pytest.skip(reason)
    with file_system(tmp_path, kind) as root:
        (root / "file").write_bytes(b"x")
        assert name_of(root / "file") == kind


@pytest.mark.mount
def test_others_have_none(tmp_path: Path) -> None:
    for name in ("lower", "upper", "work"):
        (tmp_path / name).mkdir()
    options = ",".join(f"{name}dir={tmp_path / name}" for name in ("lower", "upper", "work"))
    with mounted("-t", "overlay", "-o", options, "none", at=tmp_path / "overlay"):
        assert name_of(tmp_path / "overlay") == ""
    with hung_disk(tmp_path) as disk:
        assert name_of(disk.path) == ""
    assert name_of(Path("/proc/self/status")) == ""


@pytest.mark.mount
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_reading_leaves_no_trace_on_the_disk(tmp_path: Path, kind: str) -> None:
    if reason := why_not(kind):
        pytest.skip(reason)
    with file_system(tmp_path, kind) as root:
        subprocess.run(["mount", "-o", "remount,strictatime", str(root)], check=True)
        path = root / "file"
        path.write_bytes(b"x")
        os.utime(path, (1, 2))
        fd = open_to_read(str(path))
        assert os.pread(fd, 9, 0) == b"x"
        os.close(fd)
        assert path.stat().st_atime == 1
        path.read_bytes()
        assert path.stat().st_atime != 1


def test_a_file_of_somebody_else_is_opened_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open
    tried: list[int] = []

    def unprivileged(path: str, flags: int) -> int:
        tried.append(flags)
        if flags & os.O_NOATIME:
            raise PermissionError(1, "not yours")
        return real(path, flags)

    (tmp_path / "file").write_bytes(b"x")
    monkeypatch.setattr(os, "open", unprivileged)
    os.close(open_to_read(str(tmp_path / "file"), os.O_NOFOLLOW))
    assert [bool(flags & os.O_NOFOLLOW) for flags in tried] == [True, True]


def test_a_closed_descriptor_is_an_error() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        local_file_system(-1)


def test_only_a_foreign_device_is_not_asked_again_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    answers = {3: "", 4: "xfs"}
    asked: list[int] = []

    def ask(fd: int) -> str:
        asked.append(fd)
        return answers[fd]

    monkeypatch.setattr(file_systems, "local_file_system", ask)
    kinds = FileSystems(lambda: now)
    assert [kinds.local(fd, fd) for fd in (3, 3, 4, 4)] == ["", "", "xfs", "xfs"]
    assert asked == [3, 4, 4]
    now += FOREIGN_FOR
    answers[3] = "ext4"  # another file system took the device's number
    assert kinds.local(3, 3) == "ext4"


@pytest.mark.mount
async def test_a_file_that_a_link_leads_elsewhere_is_judged_by_itself(tmp_path: Path) -> None:
    root = tmp_path / "path"
    info = init_path(str(root), can_seal=False, can_store=True)
    (root / "sealed").mkdir()
    here, there = sector_file("sealed/1"), sector_file("sealed/2")
    (root / str(here)).write_bytes(b"here")
    (root / str(there)).symlink_to("/proc/self/status")
    lane = Lane(str(root), deadline=TimeoutsConfig().disk)
    path = LocalPath(str(root), info, lane, identity=(0, 0), real=str(root), settle=1)
    for file, local in ((here, True), (there, False)):
        found = await path.open(file, None, expected=True)
        assert bool(found.file_system) is local
        found.close()


async def test_a_failing_question_leaves_no_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "path"
    info = init_path(str(root), can_seal=False, can_store=True)
    file = sector_file("sealed/1")
    (root / "sealed").mkdir()
    (root / str(file)).write_bytes(b"here")
    lane = Lane(str(root), deadline=60)
    path = LocalPath(str(root), info, lane, identity=(0, 0), real=str(root), settle=1)

    def broken(fd: int) -> str:
        raise OSError(5, "broken")

    monkeypatch.setattr(file_systems, "local_file_system", broken)
    with pytest.raises(Exception, match="broken"):
        await path.open(file, None, expected=True)
    assert open_descriptors(root / str(file)) == 0
