"""A progress line on a terminal while a verb scans storage paths."""

from __future__ import annotations

import sys
from collections.abc import Awaitable
from typing import TypeVar

import trio
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from sectorfs.errors import SectorFSError
from sectorfs.node.admin import Admin

T = TypeVar("T")

INTERVAL = 0.25
"""Seconds between two looks at the scans."""


async def shown(admin: Admin, work: Awaitable[T]) -> T:
    """Await `work`; show the scans under way meanwhile when stderr is a terminal."""
    if not sys.stderr.isatty():
        return await work
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_follow, admin, progress)
            result = await work
            nursery.cancel_scope.cancel()
    return result


async def _follow(admin: Admin, progress: Progress) -> None:
    tasks: dict[str, TaskID] = {}
    while True:
        try:
            scans = await admin.scans()
        except SectorFSError:
            return  # the verb itself meets the same error and reports it
        for scan in scans:
            text = f"{scan.path}: {scan.done} entries"
            if scan.path in tasks:
                progress.update(tasks[scan.path], description=text)
            else:
                tasks[scan.path] = progress.add_task(text, total=None)
        await trio.sleep(INTERVAL)
