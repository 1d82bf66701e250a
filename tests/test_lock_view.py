"""`storage locks` for people: a sector, its holders, and who waits."""

from __future__ import annotations

import io

from rich.console import Console

from sectorfs.cli.lock_view import print_locks
from sectorfs.node.reports import LeaseReport, LockReport


def lease(owner: str, expires_in: float | None, **types: list[str]) -> LeaseReport:
    values = {"read": [], "write": [], **types}
    return LeaseReport(
        owner=owner,
        reason="a move",
        since="2026-01-01T00:00:00.000Z",
        expires_in=expires_in,
        **values,
    )


def text(*locks: LockReport) -> str:
    """What is printed."""
    out = io.StringIO()
    print_locks(Console(file=out, width=40), locks)
    return out.getvalue()


def test_a_sector_with_readers_a_writer_and_who_waits() -> None:
    lock = LockReport(
        sector="s-t01000-7",
        read={"cache": 2},
        write=["sealed"],
        leases=[lease("one", 43.4, read=["cache"], write=["sealed"])],
        waiting=[lease("[red]two\x1b[2J\n", None, write=["cache"])],
    )
    assert text(lock).splitlines() == [
        "s-t01000-7  cache(R:2) sealed(W)",
        "  cache(R) sealed(W)  one: a move, since 2026-01-01T00:00:00.000Z, ends in 43 s",
        "  cache(W)  [red]two [2J : a move, since 2026-01-01T00:00:00.000Z, waits",
    ]


def test_a_sector_that_is_free_and_still_waited_for() -> None:
    lock = LockReport(
        sector="s-t01000-7",
        read={},
        write=[],
        leases=[],
        waiting=[lease("one", None, read=["key"])],
    )
    assert text(lock).splitlines()[0] == "s-t01000-7  free"


def test_no_locks() -> None:
    assert text() == "no sector is locked\n"
