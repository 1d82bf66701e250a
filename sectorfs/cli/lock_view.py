"""`storage locks` for people: a line per locked sector, and one per holder and per one who waits.

``sealed(W)`` is written by somebody, ``cache(R:2)`` read by two. Built of plain text, never of
markup, because owners and reasons come from elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from sectorfs.cli.output import printable
from sectorfs.node.reports import LeaseReport, LockReport


def print_locks(out: Console, locks: Sequence[LockReport]) -> None:
    """Every locked sector."""
    if not locks:
        out.print("no sector is locked", highlight=False, markup=False)
    for lock in locks:
        for line in lock_lines(lock):
            out.print(line, soft_wrap=not out.is_terminal, highlight=False)


def lock_lines(lock: LockReport) -> list[Text]:
    """One sector."""
    counts = [f"{name}(R:{count})" for name, count in lock.read.items()]
    counts += [f"{name}(W)" for name in lock.write]
    head = Text().append(printable(lock.sector), style="bold")
    head.append(f"  {' '.join(counts)}" if counts else "  free")
    return [
        head,
        *(Text(f"  {_lease(one)}, ends in {one.expires_in or 0:.0f} s") for one in lock.leases),
        *(Text(f"  {_lease(one)}, waits", style="yellow") for one in lock.waiting),
    ]


def _lease(lease: LeaseReport) -> str:
    types = [f"{name}(R)" for name in lease.read] + [f"{name}(W)" for name in lease.write]
    who = f"{lease.owner}: {lease.reason}"
    return printable(f"{' '.join(types)}  {who}, since {lease.since}")
