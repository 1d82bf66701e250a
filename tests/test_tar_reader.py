"""Tar streams of any writer are read; cut, foreign and hostile ones are named for what they are."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sectorfs.errors import BadInput, SourceFailed, TooLarge
from sectorfs.stores import members, tar_blocks
from sectorfs.stores.layout import FULL, MINIMAL
from sectorfs.stores.tar_reader import MemberBegins, MemberEnds, TarReader
from sectorfs.stores.tar_writer import TarMember, TarWriter
from sectorfs.types import MAX_NUMBER, MemberFacts
from tests.tar_fixtures import END, MTIME, chunks, read, stream, unterminated

GIB = 2**30
LONG = "sc-02-data-" + "y" * 150 + ".dat"
FILES = {
    "empty": b"",
    "p_aux": os.urandom(64),
    "sc-02-data-tree-r-last.dat": os.urandom(1024),
    LONG: os.urandom(1300),
    "t_aux": os.urandom(511),
}
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}

contents = st.dictionaries(
    st.from_regex(r"[a-z_]{1,120}", fullmatch=True), st.binary(max_size=1600), max_size=6
)


def header(name: str = "p_aux", *, size: int = 0, kind: str = "0", mtime: int = 0) -> bytes:
    return tar_blocks.encode_header(name, kind=kind, size=size, mtime=mtime)


def extension(content: bytes, kind: str = "x") -> bytes:
    head = header("PaxHeaders.0/p_aux", size=len(content), kind=kind)
    return head + content + bytes(-len(content) % 512)


def pax(**records: str) -> bytes:
    return extension(tar_blocks.encode_pax(records))


def signed(block: bytearray) -> bytes:
    """A header with its sum made right again."""
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def facts_of(data: bytes) -> MemberFacts:
    """The first file of a stream whose content need not follow."""
    begins = TarReader("peer", max_total=MAX_NUMBER).feed(data)[0]
    assert isinstance(begins, MemberBegins)
    return begins.facts


def python_tar(info: tarfile.TarInfo, data: bytes = b"", *, tar_format: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tar_format) as archive:
        archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.mark.parametrize("size", [1, 7, 511, 512, 513, 100_000])
def test_our_own_streams_are_read_in_any_pieces(size: int) -> None:
    found, ending = read(chunks(stream(FILES), size))
    assert found == FILES
    assert list(found) == sorted(FILES)
    assert not ending.unterminated
    assert ending.members[0] == MemberFacts("empty", 0, MTIME * 10**9)


@given(contents, st.lists(st.integers(1, 1500), min_size=1, max_size=8))
def test_any_pieces_give_the_same_files(files: dict[str, bytes], sizes: list[int]) -> None:
    data = stream(files)
    pieces: list[bytes] = []
    at = 0
    while at < len(data):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(data[at : at + size])
        at += size
    found, ending = read(pieces)
    assert found == files
    assert not ending.unterminated


def test_nothing_at_all_is_an_unterminated_archive() -> None:
    reader = TarReader("peer", max_total=0)
    assert reader.feed(b"") == []
    assert read([], reader) == ({}, reader.finish())
    assert reader.finish().unterminated


@pytest.mark.parametrize("tar_format", FORMATS.values(), ids=FORMATS.keys())
def test_streams_of_python_are_read(tar_format: int) -> None:
    out = io.BytesIO()
    # USTAR has no room for a flat name above 100 characters.
    files = {name: FILES[name] for name in FILES if tar_format != 0 or name != LONG}
    with tarfile.open(fileobj=out, mode="w", format=tar_format) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), MTIME
            archive.addfile(info, io.BytesIO(data))
    found, ending = read(chunks(out.getvalue(), 1000))
    assert found == files
    assert {member.mtime_ns for member in ending.members} == {MTIME * 10**9}


@pytest.mark.parametrize("tar_format", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_streams_of_gnu_tar_are_read(tmp_path: Path, tar_format: str) -> None:
    files = {
        name: FILES[name] for name in FILES if tar_format not in ("v7", "ustar") or len(name) < 99
    }
    times = {}
    for index, (name, data) in enumerate(files.items()):
        (tmp_path / name).write_bytes(data)
        times[name] = MTIME * 10**9 + index * 100_000_001
        os.utime(tmp_path / name, ns=(0, times[name]))
    data = subprocess.run(
        ["tar", "-c", f"--format={tar_format}", "-C", str(tmp_path), *files],
        check=True,
        capture_output=True,
    ).stdout
    found, ending = read(chunks(data, 10_000))
    assert found == files
    assert not ending.unterminated
    for member in ending.members:
        exact = times[member.name]
        assert member.mtime_ns == (exact if tar_format == "posix" else exact // 10**9 * 10**9)


@pytest.mark.parametrize("tar_format", ["gnu", "posix"])
def test_gnu_tar_says_sizes_above_8_gib_in_two_ways(tmp_path: Path, tar_format: str) -> None:
    with (tmp_path / "sc-02-data-layer-1.dat").open("wb") as file:
        file.truncate(9 * GIB)
    command = ["tar", "-c", f"--format={tar_format}", "-C", str(tmp_path), "sc-02-data-layer-1.dat"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        start = process.stdout.read(4096)
        process.kill()
    assert facts_of(start).size == 9 * GIB


@pytest.mark.parametrize("size", [8 * GIB - 1, 8 * GIB, 32 * GIB, MAX_NUMBER])
def test_our_own_large_sizes_are_read(size: int) -> None:
    first = next(iter(TarWriter([TarMember(name="p_aux", size=size, mtime_ns=0)])))
    assert isinstance(first, bytes)
    assert facts_of(first).size == size


@pytest.mark.parametrize("mtime_ns", [-5 * 10**9, 0, (8**11 - 1) * 10**9, 9 * 10**18])
def test_our_own_odd_times_are_read(mtime_ns: int) -> None:
    first = next(iter(TarWriter([TarMember(name="p_aux", size=0, mtime_ns=mtime_ns)])))
    assert isinstance(first, bytes)
    assert facts_of(first).mtime_ns == mtime_ns


def test_gnu_times_before_1970_are_read() -> None:
    info = tarfile.TarInfo("p_aux")
    info.mtime = -7
    assert facts_of(python_tar(info, tar_format=tarfile.GNU_FORMAT)).mtime_ns == -7 * 10**9


def test_files_come_before_the_stream_ends() -> None:
    reader = TarReader("peer", max_total=100)
    events = reader.feed(header(size=3) + b"abc")
    assert isinstance(events[-1], MemberEnds)


@pytest.mark.parametrize("size", [1, 512, 4096])
def test_the_streams_of_old_peers_are_whole_but_unterminated(size: int) -> None:
    found, ending = read(chunks(unterminated(FILES), size))
    assert found == FILES
    assert ending.unterminated


def cut_is_within_a_file(at: int, files: dict[str, bytes]) -> bool:
    """By the layout of a stream: from a first header byte to a last content byte."""
    start = 0
    for name in sorted(files):
        heads = 512 if len(name) <= 100 else 3 * 512
        end = start + heads + len(files[name])
        if start < at < end:
            return True
        start = end + -len(files[name]) % 512
    return False


@pytest.mark.parametrize(
    ("files", "step"),
    [
        (FILES, 512),
        ({"p_aux": b"abc", "t_aux": b"x" * 513}, 1),
        ({"a": b"", "b": b"", LONG: b"1"}, 1),
    ],
)
def test_a_cut_is_told_exactly_when_it_is_within_a_file(files: dict[str, bytes], step: int) -> None:
    data = stream(files)
    for at in range(0, len(data), step):
        if cut_is_within_a_file(at, files):
            with pytest.raises(SourceFailed, match="tar ends"):
                read([data[:at]])
            continue
        found, ending = read([data[:at]])
        assert ending.unterminated
        assert files.items() >= found.items()
    assert not read([data])[1].unterminated


def test_a_cut_names_the_file_and_what_is_missing() -> None:
    with pytest.raises(SourceFailed, match="90 bytes before the end") as caught:
        read([header("t_aux", size=100) + bytes(10)])
    assert caught.value.thing == "peer: member 't_aux'"


@pytest.mark.parametrize("data", [extension(b"12 path=abc\n", "x"), extension(b"p_aux\0", "L")])
def test_a_stream_that_ends_after_an_extension_is_cut(data: bytes) -> None:
    for at in (512, 513, len(data)):
        with pytest.raises(SourceFailed, match="ends within a header"):
            read([data[:at]])


KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a character device",
    tarfile.BLKTYPE: "a block device",
    tarfile.DIRTYPE: "a directory",
    tarfile.FIFOTYPE: "a FIFO",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
    tarfile.CONTTYPE: "a member of kind '7'",
    b"g": "a member of kind 'g'",
    b"K": "a member of kind 'K'",
    b"V": "a member of kind 'V'",
    b"\xff": "a member of kind",
}


@pytest.mark.parametrize("kind", KINDS)
def test_only_regular_files_are_taken(kind: bytes) -> None:
    block = bytearray(header("p_aux"))
    block[156:157] = kind
    block[157:168] = b"/etc/passwd"
    with pytest.raises(BadInput, match=KINDS[kind]) as caught:
        read([signed(block)])
    assert caught.value.thing == "peer: member 'p_aux'"


def test_sparse_files_of_gnu_tar_are_refused(tmp_path: Path) -> None:
    with (tmp_path / "p_aux").open("wb") as file:
        file.seek(10**6)
        file.write(b"x")
    for tar_format in ("gnu", "posix"):
        command = ["tar", "-cS", f"--format={tar_format}", "-C", str(tmp_path), "p_aux"]
        data = subprocess.run(command, check=True, capture_output=True).stdout
        with pytest.raises(BadInput, match="a sparse file"):
            read([data])


BAD_NAMES = [
    "/etc/passwd",
    "..",
    "../p_aux",
    "a/../../p_aux",
    "./p_aux",
    "a/b",
    ".",
    "",
    ".hidden",
    "layer.tmp",
    "-rf",
    "p aux",
    "é",
    "a\nb",
    "n" * 256,
    "/" + "n" * 250,
]


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_that_are_not_flat_and_plain_are_refused(name: str, tar_format: int) -> None:
    info = tarfile.TarInfo("placeholder")
    info.name = name
    with pytest.raises(BadInput, match="not the name") as caught:
        read([python_tar(info, tar_format=tar_format)])
    assert repr(name[:200])[1:-1] in caught.value.thing or "\\\\x" in caught.value.thing


def test_a_prefix_makes_a_path() -> None:
    block = bytearray(header("p_aux"))
    block[345:348] = b"etc"
    with pytest.raises(BadInput, match="not the name") as caught:
        read([signed(block)])
    assert caught.value.thing == "peer: member 'etc/p_aux'"


def test_a_name_in_a_record_beats_the_one_in_the_header() -> None:
    with pytest.raises(BadInput, match="not the name"):
        read([pax(path="../x") + header("p_aux")])
    with pytest.raises(BadInput, match="not the name"):
        read([pax(path="p_aux\0/x") + header("p_aux")])
    found, _ = read([pax(path="t_aux") + header("p_aux")])
    assert list(found) == ["t_aux"]
    found, _ = read([pax(path="") + header("p_aux")])
    assert list(found) == ["p_aux"]


def test_the_same_name_twice_is_refused() -> None:
    with pytest.raises(BadInput, match="the same name twice") as caught:
        read([header("p_aux") + header("t_aux") + header("p_aux")])
    assert caught.value.thing == "peer: member 'p_aux'"


def test_only_known_names_are_taken() -> None:
    for name, allow in (("passwd", FULL), ("sc-02-data-layer-1.dat", MINIMAL)):
        with pytest.raises(BadInput, match="not a file of a sector directory") as caught:
            read([header(name)], TarReader("peer", max_total=2**40, allow=allow))
        assert name in caught.value.thing


@pytest.mark.parametrize(("name", "cap"), [("p_aux", 64), ("t_aux", 10240)])
def test_every_name_has_its_cap(name: str, cap: int) -> None:
    files = {name: bytes(cap)}
    found, _ = read([stream(files)], TarReader("peer", max_total=2**40, allow=FULL))
    assert found == files
    with pytest.raises(TooLarge, match=f"at most {cap} ") as caught:
        read([stream({name: bytes(cap + 1)})], TarReader("peer", max_total=2**40, allow=FULL))
    assert name in caught.value.thing


def test_a_size_in_a_record_is_what_the_cap_is_for() -> None:
    data = pax(size="65") + header("p_aux", size=1)
    with pytest.raises(TooLarge, match="65 bytes"):
        read([data], TarReader("peer", max_total=2**40, allow=FULL))


def test_all_files_together_have_a_cap() -> None:
    files = {"p_aux": b"x" * 600, "t_aux": b"y" * 400}
    assert read([stream(files)], TarReader("peer", max_total=1000))[0] == files
    with pytest.raises(TooLarge, match="more than 999 bytes together") as caught:
        read([stream(files)], TarReader("peer", max_total=999))
    assert "t_aux" in caught.value.thing


def test_files_are_not_without_number() -> None:
    most = b"".join(header(f"f{index}") for index in range(members.MAX_MEMBERS))
    assert len(read([most])[0]) == members.MAX_MEMBERS
    with pytest.raises(TooLarge, match="more than 10000 files"):
        read([most, header("p_aux")])


def test_any_changed_byte_of_a_header_is_noticed() -> None:
    block = header("p_aux", size=3, mtime=MTIME)
    for at in range(155):  # the last byte of the sum means nothing
        broken = bytearray(block)
        broken[at] ^= 1
        with pytest.raises(BadInput, match="a header w") as caught:
            read([bytes(broken)])
        assert caught.value.thing == "peer: first member"
    for at in range(156, 512):
        broken = bytearray(block)
        broken[at] ^= 1
        with pytest.raises(BadInput, match="wrong sum"):
            read([bytes(broken)])


def test_a_bad_header_is_placed_after_the_last_good_file() -> None:
    with pytest.raises(BadInput, match="whose sum is no number") as caught:
        read([header("p_aux") + b"x" * 512])
    assert caught.value.thing == "peer: after member 'p_aux'"


@pytest.mark.parametrize(
    "field",
    [b"12345678 9\0\0", b"00000000009\0", b"-0000000001\0", b"\xff" * 12, b"\x80" + b"\xff" * 11],
)
@pytest.mark.parametrize("start", [124, 136])
def test_numbers_that_are_none_are_refused(field: bytes, start: int) -> None:
    block = bytearray(header("p_aux"))
    block[start : start + 12] = field
    if (start, field) == (136, b"\xff" * 12):
        assert facts_of(signed(block)).mtime_ns == -(10**9)
        return
    with pytest.raises(BadInput, match=r"is no number|a size of|a time beyond"):
        read([signed(block)])


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ({"size": "x"}, "a size that is no number"),
        ({"size": "-1"}, "a size that is no number"),
        ({"size": "1e3"}, "a size that is no number"),
        ({"size": "٣"}, "a size that is no number"),
        ({"size": str(MAX_NUMBER + 1)}, "a size of 9223372036854775808"),
        ({"size": "9" * 20}, "a size that is no number"),
        ({"mtime": "soon"}, "a time that is no number"),
        ({"mtime": "1."}, "a time that is no number"),
        ({"mtime": "nan"}, "a time that is no number"),
        ({"mtime": "9" * 11}, "a time that is no number"),
        ({"mtime": "9999999999"}, "a time beyond reason"),
    ],
)
def test_records_with_nonsense_are_refused(records: dict[str, str], message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        read([pax(**records) + header("p_aux")])
    assert "p_aux" in caught.value.thing


@pytest.mark.parametrize(
    ("text", "mtime_ns"),
    [
        ("1600000000", 1_600_000_000_000_000_000),
        ("1.5", 1_500_000_000),
        ("-1.5", -1_500_000_000),
        ("0.1234567899", 123_456_789),
        ("-9223372036.854775807", -MAX_NUMBER),
    ],
)
def test_times_in_records_are_read_to_the_nanosecond(text: str, mtime_ns: int) -> None:
    assert facts_of(pax(mtime=text) + header("p_aux")).mtime_ns == mtime_ns


@pytest.mark.parametrize(
    "content",
    [
        b"9 path=x\n\n",
        b"8 path=x\n",
        b"11 path=x\n",
        b"path=x\n",
        b"0 path=x\n",
        b"-9 path=x\n",
        b"9 path=xy",
        b"99999999999 path=x\n",
        b"\0" * 20,
    ],
)
def test_records_that_do_not_add_up_are_refused(content: bytes) -> None:
    with pytest.raises(BadInput, match="do not add up") as caught:
        read([extension(content) + header("p_aux")])
    assert "p_aux" in caught.value.thing


@pytest.mark.parametrize("content", [b"3 \n", b"4 x\n", b"5 =x\n"])
def test_records_without_a_key_are_refused(content: bytes) -> None:
    with pytest.raises(BadInput, match="without a key"):
        read([extension(content) + header("p_aux")])


def test_records_we_have_no_use_for_are_passed_over() -> None:
    found, _ = read([pax(uid="5", atime="x", **{"SCHILY.xattr.user.a": "1"}) + header("p_aux")])
    assert list(found) == ["p_aux"]


def test_of_a_repeated_record_the_last_holds() -> None:
    content = tar_blocks.encode_pax({"path": "a"}) + tar_blocks.encode_pax({"path": "b"})
    assert facts_of(extension(content) + header("p_aux")).name == "b"


def test_records_belong_to_one_file_only() -> None:
    found, _ = read([pax(path="t_aux", mtime="5") + header("p_aux") + header("empty")])
    assert list(found) == ["t_aux", "empty"]


@pytest.mark.parametrize("kind", ["x", "L"])
def test_extensions_are_bounded(kind: str) -> None:
    for size in (0, 65537, 2**32):
        with pytest.raises(TooLarge, match=f"extension of {size} bytes"):
            read([header(size=size, kind=kind)])
    one = extension(b"6 a=b\n", kind)
    with pytest.raises(BadInput, match="two extensions of one kind"):
        read([one + one])


def test_an_extension_of_nothing_is_refused() -> None:
    with pytest.raises(BadInput, match="belongs to no file"):
        read([pax(path="t_aux") + bytes(END)])


def test_a_long_name_and_records_go_together() -> None:
    data = extension(LONG.encode() + b"\0", "L") + pax(mtime="3") + header("short")
    facts = facts_of(data)
    assert (facts.name, facts.mtime_ns) == (LONG, 3 * 10**9)


def test_zeros_after_the_end_are_passed_over() -> None:
    data = stream(FILES)
    assert not read([data, bytes(10 * 1024)])[1].unterminated
    assert not read([data, bytes(2**20)])[1].unterminated
    with pytest.raises(TooLarge, match="too much after the end"):
        read([data, bytes(2**20 + 1)])


def test_anything_else_after_the_end_is_refused() -> None:
    with pytest.raises(BadInput, match="more than zeros after the end"):
        read([stream(FILES) + b"x"])
    with pytest.raises(BadInput, match="a header after a zero block"):
        read([header("p_aux") + bytes(512) + header("t_aux")])


def test_an_error_is_an_error_for_good() -> None:
    reader = TarReader("peer", max_total=2**40)
    with pytest.raises(BadInput, match="sum is no number") as first:
        reader.feed(b"x" * 512)
    with pytest.raises(BadInput) as second:
        reader.feed(stream(FILES))
    with pytest.raises(BadInput) as third:
        reader.finish()
    assert first.value is second.value is third.value


@given(contents, st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), max_size=3))
def test_damaged_streams_are_read_or_refused(
    files: dict[str, bytes], damage: list[tuple[int, int]]
) -> None:
    data = bytearray(stream(files))
    for at, change in damage:
        data[at % len(data)] ^= change
    try:
        found, _ = read(chunks(bytes(data), 700))
    except (BadInput, SourceFailed):
        return
    # The checksum of a header is a sum: it finds every single change, not two that cancel out.
    if len({at % len(data) for at, _ in damage}) <= 1:
        assert {name: len(content) for name, content in found.items()} == {
            name: len(content) for name, content in files.items()
        }


@given(st.binary(max_size=3000))
def test_rubbish_is_refused(data: bytes) -> None:
    try:
        found, ending = read([data])
    except (BadInput, SourceFailed):
        return
    assert not any(data)
    assert found == {}
    assert ending.unterminated == (len(data) < 1024)
