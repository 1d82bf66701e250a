"""`storage list` for people: bars, colours, order, narrow and wide terminals."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from sectorfs.cli.storage_view import bar, bar_style, print_storages, storage_lines
from sectorfs.node.reports import StorageReport

TIB = 1 << 40


def storage(**fields: object) -> StorageReport:
    """A well storage of another node."""
    values: dict[str, object] = {
        "storage": "11111111-2222-3333-4444-555555555555",
        "path": None,
        "urls": ["http://10.0.0.6:8480/remote"],
        "weight": 10,
        "can_seal": True,
        "can_store": True,
        "max_storage": 0,
        "groups": [],
        "allow_to": [],
        "allow_types": [],
        "deny_types": [],
        "allow_miners": [],
        "deny_miners": [],
        "capacity": 10 * TIB,
        "available": 5 * TIB,
        "fs_available": 6 * TIB,
        "reserved": 0,
        "used": 0,
        "healthy": True,
        "error": None,
        "last_heartbeat": "2026-01-01T00:00:00.000Z",
        "files": {"unsealed": 2, "sealed": 3},
        **fields,
    }
    return StorageReport(**values)  # type: ignore[arg-type]  # checked by the tests that read it


def text(*storages: StorageReport, width: int = 80, terminal: bool = False) -> str:
    """What is printed."""
    out = io.StringIO()
    colours = "standard" if terminal else "auto"
    print_storages(
        Console(file=out, width=width, force_terminal=terminal, color_system=colours), storages
    )
    return out.getvalue()


def test_a_storage_in_lines() -> None:
    known = storage(path="/mnt/disk1", reserved=TIB, max_storage=8 * TIB, used=2 * TIB)
    assert text(known).splitlines() == [
        "11111111-2222-3333-4444-555555555555  seal+store  weight 10  ok",
        "  /mnt/disk1",
        "  http://10.0.0.6:8480/remote",
        "  [#######*..........]  40 %  5.0 TiB free of 10.0 TiB, 1.0 TiB reserved",
        "  [####**............]  25 %  of the limit 8.0 TiB, 1.0 TiB reserved",
        "  files: unsealed 2  sealed 3",
    ]


@pytest.mark.parametrize(
    ("used", "reserved", "whole", "shown"),
    [
        (0, 0, 100, ".........."),
        (1, 0, 100, "#........."),
        (0, 1, 100, "*........."),
        (50, 25, 100, "#####**..."),
        (99, 0, 100, "#########."),
        (99, 1, 100, "#########*"),
        (100, 0, 100, "##########"),
        (100, 50, 100, "##########"),
        (100, 1, 100, "##########"),
        (300, 300, 100, "##########"),
        (0, 300, 100, "**********"),
        (-5, -5, 100, ".........."),
        (5, 5, 0, ".........."),
        (5, 5, -1, ".........."),
        (2**62, 2**62, 2**63 - 1, "#####*****"),
    ],
)
def test_bars(used: int, reserved: int, whole: int, shown: str) -> None:
    assert bar(used, reserved, whole, 10) == shown


@pytest.mark.parametrize(
    ("share", "style"),
    [
        (0.0, "green"),
        (0.90, "green"),
        (0.901, "yellow"),
        (0.98, "yellow"),
        (0.981, "red"),
        (7.0, "red"),
    ],
)
def test_colours_of_bars(share: float, style: str) -> None:
    assert bar_style(share) == style


def test_reserved_space_colours_the_bar_as_used_space_does() -> None:
    known = storage(capacity=100, fs_available=50, reserved=49)
    assert "\x1b[31m#########*" in text(known, terminal=True)
    assert "\x1b[32m#########." in text(storage(capacity=100, fs_available=50), terminal=True)


def test_colours_on_a_terminal_only() -> None:
    sick = storage(healthy=False, error="disk is sick")
    assert "\x1b[" not in text(storage(), sick)
    shown = text(storage(), sick, terminal=True)
    assert "\x1b[32mok" in shown
    assert "\x1b[31munhealthy" in shown
    assert "\x1b[31m  why: disk is sick" in shown


@pytest.mark.parametrize("field", ["capacity", "max_storage"])
def test_storage_that_never_said_its_size(field: str) -> None:
    known = storage(**{"capacity": 0, "available": 0, "fs_available": 0, field: 0})
    assert "space unknown" in text(known)


def test_more_free_than_there_is() -> None:
    """Other programs' nodes tell what they like."""
    shown = text(storage(capacity=10, fs_available=99, available=99, reserved=-3))
    assert "]   0 %  99 B free of 10 B\n" in shown
    shown = text(storage(capacity=1, fs_available=-(2**60), available=-5))
    assert "] 999 %" in shown


def test_this_nodes_paths_come_first() -> None:
    known = [
        storage(storage="cache", path="/a", can_seal=False, can_store=False, weight=0),
        storage(storage="z", path="/b"),
        storage(storage="y", path="/a"),
        storage(storage="far-1", urls=["http://b/remote"]),
        storage(storage="far-3", urls=["http://a/remote"]),
        storage(storage="far-2", urls=["http://a/remote"]),
        storage(storage="lost", urls=[]),
    ]
    heads = [
        line.split()[0] for line in text(*known).splitlines() if line and not line.startswith(" ")
    ]
    assert heads == ["y", "z", "cache", "lost", "far-2", "far-3", "far-1"]


def test_purposes() -> None:
    assert "  seal+store  " in text(storage())
    assert "  store  " in text(storage(can_seal=False))
    assert "  seal  " in text(storage(can_store=False))
    assert "  closed  weight 10" in text(storage(can_store=False, can_seal=False))
    assert "  copies  weight 0" in text(storage(can_store=False, can_seal=False, weight=0))


def test_filters_and_groups_are_shown_when_there_are_any() -> None:
    shown = text(storage(groups=["a", "b"], deny_types=["cache"], allow_miners=["t01000"]))
    assert "  groups: a, b\n  deny types: cache\n  allow miners: t01000\n" in shown
    assert "allow types" not in shown


def test_nothing_attached() -> None:
    assert text() == "no storage is attached\n"
    assert "files: none" in text(storage(files={}))
    assert "  no URL\n" in text(storage(urls=[]))


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_every_line_fits_the_terminal(width: int) -> None:
    known = storage(
        path="/mnt/" + "long" * 30,
        error="because " * 40,
        healthy=False,
        groups=[f"group-{number}" for number in range(40)],
        used=TIB,
        max_storage=TIB,
    )
    lines = text(known, width=width, terminal=True).splitlines()
    assert max(len(plain(line)) for line in lines) <= width
    if width >= 80:
        assert sum("[####" in plain(line) for line in lines) == 2


def plain(line: str) -> str:
    """Without colours."""
    parts = line.split("\x1b[")
    return parts[0] + "".join(part.partition("m")[2] for part in parts[1:])


def test_bars_grow_with_the_terminal() -> None:
    def cells(width: int) -> int:
        [line] = [line for line in storage_lines(storage(), width=width) if "free of" in line.plain]
        return line.plain.count("#") + line.plain.count(".") - 2

    assert cells(20) == 10
    assert cells(80) == 18
    assert cells(200) == cells(10_000) == 50


def test_what_others_tell_cannot_paint_the_terminal() -> None:
    shown = text(
        storage(
            storage="[bold]id[/]",
            urls=["http://\x1b[2Jx/remote"],
            error="bad\x07\nnews [red]",
            healthy=False,
        )
    )
    assert "[bold]id[/]" in shown
    assert "why: bad  news [red]" in shown
    assert "\x1b" not in shown
    assert "\x07" not in shown
