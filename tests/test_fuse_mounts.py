"""Reading the kernel's list of mounts, and getting rid of dead ones."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from sectorfs.errors import MountFailed, PermissionRefused, Refused, TimedOut
from sectorfs.fuse import mounts
from sectorfs.fuse.mounts import MountInfo, canonical, find_mount, parse_mountinfo

LINES = rb"""22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
91 27 0:44 / /sectors rw,nosuid,nodev shared:5 - fuse.sectorfs sectorfs rw,user_id=0
92 91 0:45 / /sectors/with\040space\011tab\134back rw shared:5 master:7 - fuse.sectorfs sectorfs rw
93 27 0:46 / /other rw - fuse.sshfs host:/ rw
94 27 0:47 / /plain rw - fuse sectorfs:/root/.sectorfs rw
95 27 8:1 /sub /bind rw - xfs /dev/sda1 rw
96 27 0:48 / /sectors rw - tmpfs none rw
"""


def test_fields_with_and_without_optional_ones() -> None:
    found = parse_mountinfo(LINES)
    assert len(found) == 8
    assert found[2] == MountInfo(91, 0, 44, "/sectors", "fuse.sectorfs", "sectorfs")
    assert found[6].path == "/bind"
    assert (found[6].major, found[6].minor) == (8, 1)


def test_octal_escapes_are_undone() -> None:
    assert parse_mountinfo(LINES)[3].path == "/sectors/with space\ttab\\back"
    line = rb"1 1 0:1 / /\303\244 rw - fuse.sectorfs sectorfs rw"
    assert parse_mountinfo(line)[0].path == "/ä"


def test_whose_mount_it_is() -> None:
    ours = [mount.path for mount in parse_mountinfo(LINES) if mount.is_ours]
    assert ours == ["/sectors", "/sectors/with space\ttab\\back", "/plain"]
    assert [mount.path for mount in parse_mountinfo(LINES) if mount.is_fuse] == [
        *ours[:2],
        "/other",
        "/plain",
    ]


def test_the_later_of_two_mounts_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "MOUNTINFO", tmp_path / "mountinfo")
    (tmp_path / "mountinfo").write_bytes(LINES)
    found = find_mount("/sectors")
    assert found is not None
    assert found.fstype == "tmpfs"
    assert find_mount("/sectors/") == found
    assert find_mount("/nothing") is None


def test_links_are_followed_up_to_the_mount_point(tmp_path: Path) -> None:
    (tmp_path / "real" / "mnt").mkdir(parents=True)
    (tmp_path / "way").symlink_to("real")
    (tmp_path / "link").symlink_to("way/mnt")
    base = os.path.realpath(tmp_path)
    assert canonical(tmp_path / "way" / "mnt") == f"{base}/real/mnt"
    assert canonical(tmp_path / "link") == f"{base}/real/mnt"
    assert canonical(tmp_path / "way" / ".." / "real" / "new") == f"{base}/real/new"
    assert canonical("/") == "/"


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(MountFailed, match="symbolic links"):
        canonical(tmp_path / "a")


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "a mount"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "sectorfs", str(path)], check=True)
    yield path
    subprocess.run(["umount", "-l", str(path)], check=False, capture_output=True)


@pytest.mark.mount
def test_a_mount_is_found_and_detached(tmpfs: Path) -> None:
    found = find_mount(tmpfs)
    assert found is not None
    assert found.fstype == "tmpfs"
    with (tmpfs / "busy").open("w"):
        mounts.detach(tmpfs)
    assert find_mount(tmpfs) is None
    mounts.detach(tmpfs)  # nothing there is fine
    mounts.detach(tmpfs / "missing")


@pytest.mark.mount
def test_somebody_elses_mount_is_refused(tmpfs: Path) -> None:
    with pytest.raises(Refused, match="something else"):
        mounts.clear_dead_mount(tmpfs, lambda mount: False)
    assert find_mount(tmpfs) is not None


def test_without_a_mount_there_is_nothing_to_clear(tmp_path: Path) -> None:
    assert mounts.clear_dead_mount(tmp_path, lambda mount: False) is False


def test_a_living_mount_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "MOUNTINFO", tmp_path / "mountinfo")
    (tmp_path / "mountinfo").write_bytes(b"\n".join(LINES.splitlines()[:3]))
    with pytest.raises(Refused, match="mounted already"):
        mounts.clear_dead_mount("/sectors", lambda mount: True)


def test_a_mount_that_stays_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "MOUNTINFO", tmp_path / "mountinfo")
    monkeypatch.setattr(mounts, "FUSECTL", tmp_path / "none")
    (tmp_path / "mountinfo").write_bytes(b"\n".join(LINES.splitlines()[:3]))
    with pytest.raises(Refused, match="cannot be unmounted"):
        mounts.clear_dead_mount("/sectors", lambda mount: False)


def test_aborting_a_connection_that_is_gone_is_fine(tmp_path: Path) -> None:
    mounts.abort(4_000_000)


def test_an_abort_that_is_refused_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "7" / "abort").mkdir(parents=True)
    monkeypatch.setattr(mounts, "FUSECTL", tmp_path)
    with pytest.raises(Exception, match="cannot abort"):
        mounts.abort(7)
    (tmp_path / "8").mkdir()
    mounts.abort(8)
    assert (tmp_path / "8" / "abort").read_text() == "1"


def test_a_failed_fusectl_mount_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mounts, "FUSECTL", tmp_path)
    monkeypatch.setattr(mounts, "_libc_call", lambda name, *arguments: 1)
    assert mounts.connection(7) is None
    assert "cannot be mounted" in caplog.text


@pytest.fixture
def as_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`umount2` is not permitted, and the helper is what the test puts in its place."""
    monkeypatch.setattr(mounts, "_libc_call", lambda name, *arguments: 1)
    monkeypatch.setattr(mounts, "MOUNTINFO", tmp_path / "mountinfo")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "mountinfo").write_bytes(LINES)
    return tmp_path / "fusermount3"


def helper(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_a_user_unmounts_with_the_helper(as_user: Path, tmp_path: Path) -> None:
    helper(as_user, f'echo "$@" > {tmp_path}/called; : > {tmp_path}/mountinfo')
    mounts.detach("/sectors")
    assert (tmp_path / "called").read_text() == "-u -z -- /sectors\n"


def test_what_the_helper_says_is_passed_on(as_user: Path) -> None:
    helper(as_user, "echo not yours >&2; exit 1")
    with pytest.raises(PermissionRefused, match="not yours"):
        mounts.detach("/sectors")


def test_a_missing_helper_is_named(
    as_user: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PermissionRefused, match="install fuse3"):
        mounts.detach("/sectors")


def test_other_failures_of_umount_are_translated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mounts, "_libc_call", lambda name, *arguments: 5)
    with pytest.raises(Exception, match="cannot unmount"):
        mounts.detach(tmp_path)


async def test_waiting_for_a_mount_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    monkeypatch.setattr(mounts, "MOUNTINFO", tmp_path / "mountinfo")
    (tmp_path / "mountinfo").write_bytes(LINES.splitlines()[1])
    with pytest.raises(TimedOut):
        await mounts.wait_mounted("/sectors", patience=10)

    async def mount_later() -> None:
        await trio.sleep(1)
        (tmp_path / "mountinfo").write_bytes(LINES.splitlines()[2])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(mount_later)
        assert (await mounts.wait_mounted("/sectors", patience=10)).minor == 44


@pytest.mark.parametrize("kind", ["missing", "file", "mounted"])
def test_a_bad_mount_point_is_explained(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / kind
    if kind == "file":
        path.write_text("")
    if kind == "mounted":
        path = Path("/plain")
        monkeypatch.setattr(mounts, "MOUNTINFO", tmp_path / "mountinfo")
        (tmp_path / "mountinfo").write_bytes(LINES)
    reason = {"missing": "No such file", "file": "not a directory", "mounted": "mounted already"}
    with pytest.raises(MountFailed, match=reason[kind]) as caught:
        mounts.check_mountpoint(str(path))
    assert caught.value.exit_code == 32
    assert caught.value.hint


def test_a_missing_device_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def missing(path: str, flags: int, *rest: int) -> int:
        if path == "/dev/fuse":
            raise FileNotFoundError(2, "No such file or directory")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", missing)
    with pytest.raises(MountFailed, match=r"/dev/fuse.*modprobe fuse"):
        mounts.check_mountpoint(str(tmp_path))


def test_bounds_that_cannot_be_set_are_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mounts, "FUSECTL", tmp_path / "none")
    mount = MountInfo(1, 0, 4_000_000, "/sectors", "fuse.sectorfs", "sectorfs")
    mounts.tune(mount, bounds=True)
    assert len(caplog.records) == 1
    assert "read_ahead_kb" in caplog.text
    assert "4000000/max_background" in caplog.text
    caplog.clear()
    mounts.tune(mount, bounds=False)
    assert "read_ahead_kb" in caplog.text
    assert "max_background" not in caplog.text
