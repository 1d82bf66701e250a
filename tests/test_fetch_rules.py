"""Which files are streamed, and which of them are worth a copy."""

from __future__ import annotations

import pytest

from sectorfs.config import FetchConfig
from sectorfs.stores.fetch_rules import (
    FILL_AFTER,
    SMALL,
    is_streamed,
    is_worth_a_copy,
    may_fill,
)
from sectorfs.types import FileType


def test_unsealed_files_are_streamed_and_the_others_filled_unless_told() -> None:
    policy = FetchConfig().policy_of
    assert policy(FileType.UNSEALED) == "stream"
    assert {policy(kind) for kind in FileType if kind is not FileType.UNSEALED} == {"fill"}
    told = FetchConfig({"unsealed": "fill", "cache": "open"}).policy_of
    assert (told(FileType.UNSEALED), told(FileType.CACHE)) == ("fill", "open")
    assert told(FileType.SEALED) == "fill"


@pytest.mark.parametrize(
    ("policy", "size", "streamed"),
    [
        ("fill", SMALL + 1, True),
        ("stream", SMALL + 1, True),
        ("open", SMALL + 1, False),
        ("fill", SMALL, False),
        ("stream", 0, False),
    ],
)
def test_large_files_are_streamed(policy: str, size: int, streamed: bool) -> None:
    assert is_streamed(policy, size) is streamed  # type: ignore[arg-type]  # one of them


@pytest.mark.parametrize(
    ("member", "may"),
    [
        (None, True),
        ("p_aux", True),
        ("sc-02-data-tree-r-last-0.dat", True),
        ("sc-02-data-layer-11.dat", False),
        ("sc-02-data-tree-c-0.dat", False),
        ("sc-02-data-tree-d.dat", False),
    ],
)
def test_what_only_sealing_reads_is_never_filled_unasked(member: str | None, may: bool) -> None:
    assert may_fill("fill", member) is may
    assert not may_fill("stream", member)
    assert not may_fill("open", member)


@pytest.mark.parametrize(
    ("streak", "present", "worth"),
    [
        (0, 0, False),
        (FILL_AFTER - 1, 1 << 20, False),
        (FILL_AFTER, 1 << 20, True),
        (0, (2 << 30) - 1, False),
        (0, 2 << 30, True),
    ],
)
def test_a_copy_is_worth_it_once_enough_was_read(streak: int, present: int, worth: bool) -> None:
    assert is_worth_a_copy(streak=streak, present=present, size=32 << 30) is worth
