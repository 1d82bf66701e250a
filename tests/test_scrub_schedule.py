"""`[scrub]`: what may be written there, and a node that keeps to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sectorfs.config import Config, interval, load
from sectorfs.errors import BadConfig
from tests.cluster import cluster, until
from tests.cluster_fixtures import attach, configure, locations, noise, put, status
from tests.scrub_fixtures import SIZE, flip

ONE = "sealed/s-t01000-1"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("", 0), ("0", 0), (" ", 0), ("1h", 3600), ("30d", 30 * 86400), (" 8 w ", 8 * 7 * 86400)],
)
def test_intervals(text: str, seconds: float) -> None:
    assert interval(text) == seconds


@pytest.mark.parametrize(
    "text", ["30", "d", "0d", "-1d", "1.5d", "5m", "1y", "30 days", "٣d", "999999d", "1d 2h"]
)
def test_what_is_no_interval_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match="not a time"):
        interval(text)
    path = tmp_path / "config.toml"
    path.write_text(f'[scrub]\nevery = "{text}"\n')
    with pytest.raises(BadConfig, match=r"scrub\.every: not a time"):
        load(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("every = 30", "scrub.every"),
        ('max_rate = "fast"', "scrub.max_rate"),
        ('max_rate = "1KB"', "scrub.max_rate"),
        ("repair = true", "scrub.repair"),
    ],
)
def test_other_mistakes_are_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(f"[scrub]\n{text}\n")
    with pytest.raises(BadConfig) as caught:
        load(path)
    assert words in str(caught.value)


def test_by_default_nothing_is_read() -> None:
    assert interval(Config().scrub.every) == 0


def test_a_node_keeps_to_its_schedule(tmp_path: Path) -> None:
    with cluster(tmp_path, "node") as [node]:
        configure(node)
        node.start()
        attach(node, tmp_path / "disk")
        put(tmp_path / "disk" / ONE, noise("one", SIZE))
        until("the file", lambda: locations(node, ONE))
        assert status(node).scrubs == []
        node.stop()
        configure(node, scrub={"every": "30d", "max_rate": "500MB"})
        node.start()
        until("a pass", lambda: [one for one in status(node).scrubs if one.states])
        (scrub,) = [one for one in status(node).scrubs if one.states]
        assert scrub.states == {"unproved": 1}
        assert scrub.ended is not None
        node.stop()
        flip(tmp_path / "disk" / ONE, 7)
        node.start()
        until("the file", lambda: locations(node, ONE))
        assert [one.states for one in status(node).scrubs if one.states] == [{"unproved": 1}]
        assert status(node).verifying == [], "the next is due in thirty days"
