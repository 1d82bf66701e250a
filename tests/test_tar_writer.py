"""What we send as tar is what GNU tar and Python's tarfile read, to the byte and the length."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sectorfs.errors import BadInput, TooLarge
from sectorfs.stores import members
from sectorfs.stores.tar_writer import FilePart, TarMember, TarWriter, members_of
from sectorfs.types import MAX_NUMBER
from tests.tar_fixtures import MTIME, members_for, parts, stream

GIB = 2**30
LONG = "sc-02-data-" + "x" * 200 + ".dat"
FILES = {
    "p_aux": os.urandom(64),
    "empty": b"",
    "sc-02-data-tree-r-last.dat": os.urandom(512),
    "t_aux": os.urandom(1000),
    LONG: b"long",
}


def member(
    name: str = "p_aux",
    *,
    size: int = 64,
    mtime_ns: int = 0,
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
) -> TarMember:
    return TarMember(name=name, size=size, mtime_ns=mtime_ns, mode=mode, uid=uid, gid=gid)


def headers(info: TarMember) -> bytes:
    """What comes before the content of the only member."""
    first = next(iter(TarWriter([info])))
    assert isinstance(first, bytes)
    return first


def parsed(info: TarMember) -> tarfile.TarInfo:
    """A member as Python's tarfile understands its headers."""
    with tarfile.open(fileobj=io.BytesIO(headers(info))) as archive:
        [found] = [archive.next()]
    assert found is not None
    return found


def test_python_reads_every_file() -> None:
    with tarfile.open(fileobj=io.BytesIO(stream(FILES))) as archive:
        assert archive.getnames() == sorted(FILES)
        for info in archive:
            content = archive.extractfile(info)
            assert content is not None
            assert content.read() == FILES[info.name]
            assert info.isreg()
            assert (info.mtime, info.mode) == (MTIME, 0o644)


def test_gnu_tar_reads_every_file(tmp_path: Path) -> None:
    result = subprocess.run(
        ["tar", "-xf", "-", "-C", str(tmp_path)], input=stream(FILES), capture_output=True
    )
    assert (result.returncode, result.stderr) == (0, b"")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == FILES
    assert {path.stat().st_mtime for path in tmp_path.iterdir()} == {MTIME}


def test_a_directory_of_the_disk_is_what_gnu_tar_compares_equal(tmp_path: Path) -> None:
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
        os.utime(tmp_path / name, (MTIME, MTIME))
    os.chmod(tmp_path / "p_aux", 0o600)
    os.chown(tmp_path / "t_aux", 12345, 54321)
    data = b"".join(
        (tmp_path / part.name).read_bytes() if isinstance(part, FilePart) else part
        for part in TarWriter(members_of(tmp_path))
    )
    result = subprocess.run(
        ["tar", "--compare", "-f", "-", "-C", str(tmp_path)], input=data, capture_output=True
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")


def test_the_stream_closes_as_posix_has_it() -> None:
    assert stream({}) == bytes(1024)
    data = stream({"p_aux": b"x"})
    assert len(data) == 512 + 512 + 1024
    assert data[513:] == bytes(511 + 1024)


def test_files_are_named_not_read() -> None:
    writer = TarWriter(members_for({"t_aux": b"22", "empty": b"", "p_aux": b"1"}))
    kinds = [part if isinstance(part, FilePart) else len(part) for part in writer]
    assert kinds == [512, 512, FilePart("p_aux", 1), 511 + 512, FilePart("t_aux", 2), 510 + 1024]
    assert [*writer] == [*writer]


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,140}", fullmatch=True), st.binary(max_size=1100)))
def test_the_length_is_known_beforehand(files: dict[str, bytes]) -> None:
    whole = [*parts(files)]
    assert TarWriter(members_for(files)).length == sum(map(len, whole))
    assert all(whole)
    with tarfile.open(fileobj=io.BytesIO(b"".join(whole))) as archive:
        assert archive.getnames() == sorted(files)


@pytest.mark.parametrize(
    ("size", "blocks"), [(8 * GIB - 1, 1), (8 * GIB, 3), (32 * GIB, 3), (MAX_NUMBER, 3)]
)
def test_sizes_from_8_gib_are_pax_records(size: int, blocks: int) -> None:
    info = member(size=size)
    assert len(headers(info)) == 512 * blocks
    assert parsed(info).size == size
    assert (f"size={size}\n".encode() in headers(info)) == (blocks == 3)
    assert TarWriter([info]).length == len(headers(info)) + size + (-size % 512) + 1024


def test_gnu_tar_lists_a_layer_of_32_gib(tmp_path: Path) -> None:
    writer = TarWriter([member("sc-02-data-layer-1.dat", size=32 * GIB), member("t_aux")])
    with (tmp_path / "sparse.tar").open("wb") as file:
        for part in writer:
            if isinstance(part, FilePart):
                file.seek(part.size, os.SEEK_CUR)
            else:
                file.write(part)
        assert file.tell() == writer.length
    result = subprocess.run(
        ["tar", "-tvf", str(tmp_path / "sparse.tar")], capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (0, "")
    first, second = result.stdout.splitlines()
    assert str(32 * GIB) in first
    assert "t_aux" in second


@pytest.mark.parametrize(
    ("mtime_ns", "seconds"),
    [
        (0, 0),
        (499_999_999, 0),
        (500_000_000, 1),
        (1_600_000_000_999_999_999, 1_600_000_001),
        (-1_000_000_000, -1),
        ((8**11 - 1) * 10**9, 8**11 - 1),
        (8**11 * 10**9, 8**11),
    ],
)
def test_times_are_whole_seconds(mtime_ns: int, seconds: int) -> None:
    assert parsed(member(mtime_ns=mtime_ns)).mtime == seconds


@pytest.mark.parametrize("owner", [0, 8**7 - 1, 8**7, 2**32 - 2])
def test_owners_of_any_number_are_kept(owner: int) -> None:
    info = parsed(member(uid=owner, gid=owner, mode=0o4750))
    assert (info.uid, info.gid, info.mode) == (owner, owner, 0o4750)


@pytest.mark.parametrize("length", [99, 100, 101, 255])
def test_names_of_any_length_are_kept(length: int) -> None:
    assert parsed(member("n" * length)).name == "n" * length


@pytest.mark.parametrize("name", ["", "..", "../p_aux", "/p_aux", "a/b", "x.tmp", ".x", "é", "-rf"])
def test_names_no_reader_should_take_are_refused(name: str) -> None:
    with pytest.raises(BadInput, match="not the name") as caught:
        TarWriter([member(name)])
    assert caught.value.thing == name


@pytest.mark.parametrize(
    "values", [{"size": -1}, {"size": MAX_NUMBER + 1}, {"uid": -1}, {"gid": -1}, {"mode": -1}]
)
def test_numbers_no_tar_can_say_are_refused(values: dict[str, int]) -> None:
    with pytest.raises(BadInput, match="p_aux"):
        TarWriter([member("p_aux", **values)])


def test_a_name_twice_is_refused() -> None:
    with pytest.raises(BadInput, match="p_aux: twice"):
        TarWriter([member(), member("t_aux"), member()])


def test_more_files_than_readers_take_are_refused() -> None:
    most = [member(f"f{index}") for index in range(members.MAX_MEMBERS)]
    assert TarWriter(most).length
    with pytest.raises(TooLarge, match="10000 files"):
        TarWriter([*most, member()])


def test_only_regular_files_with_plain_names_travel_and_links_to_such(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sectorfs.stores.tar_writer")
    for name in ("t_aux", "p_aux", ".hidden", "layer.tmp"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to("p_aux")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "up").symlink_to("directory")
    os.mkfifo(tmp_path / "fifo")
    assert [member.name for member in members_of(tmp_path)] == ["link", "p_aux", "t_aux"]
    left = {"'.hidden'", "'layer.tmp'", "'directory'", "'dangling'", "'up'", "'fifo'"}
    assert {record.getMessage().split()[1] for record in caplog.records} == left


def test_files_not_on_the_list_stay_behind(tmp_path: Path) -> None:
    for name in ("t_aux", "p_aux", "other"):
        (tmp_path / name).write_bytes(b"x")
    assert [member.name for member in members_of(tmp_path, only={"t_aux"})] == ["t_aux"]


def test_a_directory_can_be_given_by_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "p_aux"
    path.write_bytes(b"abc")
    path.chmod(0o640)
    os.utime(path, ns=(1, 1_234_567_890))
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        [found] = members_of(fd)
    finally:
        os.close(fd)
    owner = path.stat()
    assert found == TarMember(
        name="p_aux",
        size=3,
        mtime_ns=1_234_567_890,
        mode=0o640,
        uid=owner.st_uid,
        gid=owner.st_gid,
    )


def test_a_missing_directory_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        members_of(tmp_path / "gone")
