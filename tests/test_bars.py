"""Bars: on one file of one source, until it is declared anew, and not for ever."""

from __future__ import annotations

import pytest

from sectorfs.stores import bars as bars_module
from sectorfs.stores.bars import BARRED_SECONDS, Bars
from sectorfs.stores.sources import PeerSource
from sectorfs.types import Facts, FileType, SectorFile, SectorID, StorageID

ONE, TWO = (SectorFile(FileType.SEALED, SectorID(1000, number)) for number in (1, 2))
A, B = (PeerSource(StorageID(name), f"http://{name}/remote") for name in "ab")


class Setting:
    def __init__(self) -> None:
        self.facts: dict[tuple[SectorFile, StorageID], Facts | None] = {}
        self.bars = Bars(lambda file, storage: self.facts.get((file, storage)))
        self.facts[ONE, A.storage] = Facts(10, 20)

    def barred(self, now: float = 1.0) -> list[tuple[SectorFile, PeerSource]]:
        return [(bar.file, bar.source) for bar in self.bars.all(now)]


def test_a_bar_is_on_one_file_of_one_source() -> None:
    it = Setting()
    it.bars.add(ONE, A, "gave wrong bytes", 0.0)
    assert it.bars.of(ONE, A, 1.0) is not None
    assert it.bars.of(TWO, A, 1.0) is None
    assert it.bars.of(ONE, B, 1.0) is None
    assert it.barred() == [(ONE, A)]


def test_the_last_comes_first_and_says_how_often() -> None:
    it = Setting()
    it.bars.add(ONE, A, "gave wrong bytes: 0-9", 0.0)
    it.bars.add(TWO, B, "gave wrong hashes", 0.0)
    it.bars.add(ONE, A, "gave wrong bytes: 5-9", 0.5)
    assert it.barred() == [(ONE, A), (TWO, B)]
    assert str(it.bars.all(1.0)[0]) == (
        "gave wrong bytes: 5-9, 2 times; asked last for this file until it is declared anew"
    )


@pytest.mark.parametrize("facts", [None, Facts(10, 21), Facts(11, 20), Facts(10, 20, None, b"d")])
def test_it_ends_when_the_file_is_declared_anew(facts: Facts | None) -> None:
    it = Setting()
    it.bars.add(ONE, A, "gave wrong bytes", 0.0)
    it.facts[ONE, A.storage] = facts
    assert it.barred() == []
    it.facts[ONE, A.storage] = Facts(10, 20)
    assert it.barred() == [], "what has ended does not begin again"


def test_it_ends_after_a_day() -> None:
    it = Setting()
    it.bars.add(ONE, A, "gave wrong bytes", 0.0)
    assert it.barred(BARRED_SECONDS - 1) == [(ONE, A)]
    assert it.barred(BARRED_SECONDS) == []


def test_there_are_not_more_than_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bars_module, "MOST", 1)
    it = Setting()
    it.bars.add(ONE, A, "gave wrong bytes", 0.0)
    it.bars.add(TWO, A, "gave wrong bytes", 0.0)
    assert it.barred() == [(TWO, A)]
