"""`storage list` for people: a block per storage, with bars of what is used and reserved.

Built of plain text with styles, never of markup, because paths and errors come from elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.text import Text

from sectorfs.cli.output import printable, size
from sectorfs.node.reports import StorageReport

BAR_WIDTHS = (10, 50)
"""Cells of the narrowest and the widest bar."""
BESIDE_BAR = 62
"""Columns for the figures beside a bar."""
YELLOW, RED = 0.90, 0.98
"""Shares in use above which a bar is yellow, and red."""

_INDENT = "  "
_LISTS = ("groups", "allow_to", "allow_types", "deny_types", "allow_miners", "deny_miners")


def print_storages(out: Console, storages: Sequence[StorageReport]) -> None:
    """Every storage: this node's by path, then the others by URL."""
    if not storages:
        out.print("no storage is attached", highlight=False, markup=False)
    for number, storage in enumerate(sorted(storages, key=_order)):
        if number:
            out.print()
        for line in storage_lines(storage, width=out.width):
            out.print(line, soft_wrap=not out.is_terminal, highlight=False)


def _order(storage: StorageReport) -> tuple[object, ...]:
    copies_only = not (storage.can_seal or storage.can_store)
    where = storage.path or " ".join(sorted(storage.urls))
    return storage.path is None, copies_only, where, storage.storage


def storage_lines(storage: StorageReport, *, width: int) -> list[Text]:
    """One storage on a terminal of so many columns."""
    lines = [_head(storage), *_places(storage)]
    cells = min(max(width - BESIDE_BAR, BAR_WIDTHS[0]), BAR_WIDTHS[1])
    lines.append(_space_line(storage, cells))
    if storage.max_storage > 0:
        lines.append(_limit_line(storage, cells))
    counts = "  ".join(f"{name} {count}" for name, count in storage.files.items())
    lines.append(Text(f"{_INDENT}files: {counts or 'none'}"))
    settings = [
        f"{name.replace('_', ' ')}: {', '.join(_clean(getattr(storage, name)))}"
        for name in _LISTS
        if getattr(storage, name)
    ]
    lines += [Text(_INDENT + text) for text in settings]
    if storage.error is not None:
        lines.append(Text(f"{_INDENT}why: {printable(storage.error)}", style="red"))
    return lines


def _head(storage: StorageReport) -> Text:
    """Id, purpose, weight, health: 78 columns at most with a UUID and a usual weight."""
    purposes = [
        word for word, flag in (("seal", storage.can_seal), ("store", storage.can_store)) if flag
    ]
    line = Text().append(printable(storage.storage), style="bold")
    idle = "closed" if storage.weight else "copies"
    line.append(f"  {'+'.join(purposes) or idle}  weight {storage.weight}  ")
    health, style = ("ok", "green") if storage.healthy else ("unhealthy", "red")
    return line.append(health, style=style)


def _places(storage: StorageReport) -> list[Text]:
    places = [storage.path] if storage.path else []
    nodes = {url: kind for url, kind in storage.nodes.items() if kind != "sectorfs"}
    places += [f"{url} ({nodes[url]})" if url in nodes else url for url in storage.urls]
    return [Text(_INDENT + text) for text in _clean(places)] or [Text(f"{_INDENT}no URL")]


def _space_line(storage: StorageReport, cells: int) -> Text:
    if storage.capacity <= 0:
        return Text(f"{_INDENT}space unknown")
    used = max(0, storage.capacity - storage.fs_available)
    figures = f"{size(storage.available)} free of {size(storage.capacity)}"
    return _bar_line(used, storage.reserved, storage.capacity, cells, figures)


def _limit_line(storage: StorageReport, cells: int) -> Text:
    figures = f"of the limit {size(storage.max_storage)}"
    return _bar_line(storage.used, storage.reserved, storage.max_storage, cells, figures)


def _bar_line(used: int, reserved: int, whole: int, cells: int, figures: str) -> Text:
    style = bar_style((used + reserved) / whole)
    line = Text(f"{_INDENT}[")
    line.append(bar(used, reserved, whole, cells), style=style)
    line.append("] ")
    line.append(f"{min(used * 100 // whole, 999):3d} %", style=style)
    line.append(f"  {figures}")
    if reserved > 0:
        line.append(f", {size(reserved)} reserved")
    return line


def bar(used: int, reserved: int, whole: int, cells: int) -> str:
    """``####**....``: used, reserved, free; what is there at all has a cell while there is room."""
    if whole <= 0:
        return "." * cells
    full = _cells(used, whole, cells)
    held = min(_cells(reserved, whole, cells), cells - full)
    return "#" * full + "*" * held + "." * (cells - full - held)


def _cells(part: int, whole: int, cells: int) -> int:
    if part <= 0:
        return 0
    return min(cells, max(1, part * cells // whole))


def bar_style(share: float) -> str:
    """The colour of a bar by the share in use."""
    if share > RED:
        return "red"
    return "yellow" if share > YELLOW else "green"


def _clean(texts: Iterable[str]) -> list[str]:
    return [printable(text) for text in texts]
