"""Runs of the scrub: passes that go on whoever asks, the schedule, disks that fall silent."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
import trio

from sectorfs.config import TimeoutsConfig
from sectorfs.errors import Refused
from sectorfs.stores import scrubber as scrubbing
from sectorfs.stores.local_path import LocalPath
from sectorfs.stores.scrub import Examined
from sectorfs.stores.scrub_notes import ScrubNotes
from sectorfs.stores.scrubber import Run, Scrubber
from sectorfs.stores.whole_reads import Meter
from sectorfs.types import FileType, SectorFile
from tests.cluster_fixtures import noise
from tests.hung_disk import hung_disk
from tests.local_fixtures import sector_file, until
from tests.scrub_fixtures import ScrubRig, flip, scrub_rig

PIECES = [sector_file(FileType.PIECE, number, miner=0) for number in range(1, 9)]
DAY = 86_400.0


class Clock:
    """A time of day that is set at will."""

    now_ns = 1000 * int(DAY) * 10**9

    def __call__(self) -> int:
        return self.now_ns


class Held:
    """Looks at files, each once it is let go; and remembers which."""

    def __init__(self, node: ScrubRig) -> None:
        self._node = node
        self.looked: list[tuple[str, SectorFile]] = []
        self.places = trio.Semaphore(0)
        self.free = True

    async def examine(self, path: LocalPath, file: SectorFile, meter: Meter) -> Examined:
        if not self.free:
            await self.places.acquire()
        found = await self._node.examiner.examine(path, file, meter)
        self.looked.append((Path(path.path).name, file))
        return found

    def names(self) -> list[int]:
        """Numbers of the sectors looked at."""
        return [file.sector.number for _, file in self.looked]


class Node:
    """A node's parts with a scrubber."""

    def __init__(self, parts: ScrubRig, *, every: float = 0) -> None:
        self.parts = parts
        self.clock = Clock()
        self.held = Held(parts)
        self.start(every=every)

    def start(self, *, every: float = 0) -> None:
        """Another process, on the same repo."""
        root = self.parts.parts.root / "repo" / "scrub"
        self.notes = ScrubNotes(root, deadline=5, now_ns=self.clock)
        self.scrubber = Scrubber(
            local=self.parts.parts.store,
            catalog=self.parts.catalog,
            examiner=self.held,  # type: ignore[arg-type]  # an examiner that can be held
            notes=self.notes,
            mender=self.parts.mender,
            every=every,
        )

    async def scrub(self, *names: str, anew: bool = False) -> Run:
        """A command over some storages."""
        async with self.scrubber.run("test") as run:
            paths = [self.parts.path(name) for name in names]
            await self.scrubber.scrub(run, paths, anew=anew)
        return run


@pytest.fixture
async def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Node]:
    monkeypatch.setattr(scrubbing, "CHECK", 0.05)
    async with scrub_rig(tmp_path, "disk", "other") as parts:
        for file in PIECES:
            await parts.put("disk", file, noise(str(file), 5000), hashed=True)
        yield Node(parts)


async def test_a_pass_looks_at_everything_and_counts(node: Node) -> None:
    flip(node.parts.parts.path("disk") / str(PIECES[3]), 5)
    run = await node.scrub("disk", "other")
    assert node.held.names() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert (run.files, run.bytes, run.total, run.found) == (8, 40_000, 40_000, 1)
    assert run.states["ok"] == 7
    notes = node.notes.of(node.parts.parts.ids["disk"])
    assert notes.last is not None
    assert notes.last.states == {"ok": 7, "damaged": 1}
    assert [told.sector for told in notes.findings] == ["s-t00-4"]


async def test_a_pass_that_was_cancelled_goes_on_in_the_next_process(node: Node) -> None:
    node.held.free = False
    for _ in range(3):
        node.held.places.release()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(node.scrub, "disk"))
        await until(lambda: len(node.held.looked) == 3)
        nursery.cancel_scope.cancel()
    assert node.scrubber.runs == []
    node.held.free = True
    node.start()
    await node.notes.read()
    await node.scrub("disk")
    assert node.held.names() == [1, 2, 3, 4, 5, 6, 7, 8]
    await node.scrub("disk")
    assert len(node.held.names()) == 16


async def test_a_pass_that_is_to_begin_anew_does(node: Node) -> None:
    node.held.free = False
    for _ in range(3):
        node.held.places.release()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(node.scrub, "disk"))
        await until(lambda: len(node.held.looked) == 3)
        nursery.cancel_scope.cancel()
    node.held.free = True
    await node.scrub("disk", anew=True)
    assert node.held.names() == [1, 2, 3, 1, 2, 3, 4, 5, 6, 7, 8]


async def test_a_crash_costs_no_more_than_the_looks_since_the_last_note(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scrubbing, "NOTE_EVERY", 0)
    node.held.free = False
    for _ in range(3):
        node.held.places.release()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(node.scrub, "disk"))
        await until(lambda: node.scrubber.runs and node.scrubber.runs[0].files == 3)
        crashed = ScrubNotes(node.parts.parts.root / "repo" / "scrub", deadline=5)
        await until(partial(_noted, crashed, node))
        nursery.cancel_scope.cancel()


async def _noted(notes: ScrubNotes, node: Node) -> bool:
    await notes.read()
    now = notes.of(node.parts.parts.ids["disk"]).now
    return now is not None and now.after == str(PIECES[2])


async def test_two_commands_on_one_storage_are_one_too_many(node: Node) -> None:
    node.held.free = False
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(node.scrub, "disk"))
        await until(lambda: node.scrubber.runs and node.scrubber.runs[0].file)
        with pytest.raises(Refused, match="already"):
            await node.scrub("disk")
        nursery.cancel_scope.cancel()


async def test_named_files_are_looked_at_beside_a_pass(node: Node) -> None:
    path = node.parts.path("disk")
    flip(node.parts.parts.path("disk") / str(PIECES[0]), 5)
    async with node.scrubber.run("test", every=True) as run:
        await node.scrubber.verify(run, [(path, PIECES[0]), (path, PIECES[1])])
    assert [finding.state for finding in run.findings] == ["damaged", "ok"]
    assert run.total == 10_000
    notes = node.notes.of(path.storage)
    assert [told.sector for told in notes.findings] == ["s-t00-1"]
    assert notes.now is None
    flip(node.parts.parts.path("disk") / str(PIECES[0]), 5)
    await node.scrub("disk")
    assert notes.findings == []


async def test_findings_of_a_run_are_bounded(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrubbing, "MOST_KEPT", 3)
    for file in PIECES:
        flip(node.parts.parts.path("disk") / str(file), 5)
    run = await node.scrub("disk")
    assert (len(run.findings), run.more, run.states["damaged"]) == (3, 5, 8)


# --- the schedule ---


async def test_the_schedule_begins_what_is_due_and_nothing_else(node: Node) -> None:
    node.start(every=30 * DAY)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.scrubber.run_schedule)
        await until(lambda: len(node.held.looked) == 8 and not node.scrubber.runs)
        node.clock.now_ns += int(29 * DAY) * 10**9
        await until(lambda: not node.scrubber.runs)
        for _ in range(5):
            await trio.testing.wait_all_tasks_blocked()
        assert len(node.held.looked) == 8
        node.clock.now_ns += int(2 * DAY) * 10**9
        await until(lambda: len(node.held.looked) == 16)
        nursery.cancel_scope.cancel()


async def test_without_a_schedule_nothing_begins(node: Node) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.scrubber.run_schedule)
        for _ in range(5):
            await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert node.held.looked == []


async def test_a_command_takes_a_pass_over_and_the_schedule_goes_on_after_it(node: Node) -> None:
    node.start(every=30 * DAY)
    node.held.free = False
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.scrubber.run_schedule)
        for _ in range(2):
            node.held.places.release()
        await until(lambda: node.held.names() == [1, 2])
        async with trio.open_nursery() as command:
            command.start_soon(partial(node.scrub, "disk"))
            await until(lambda: [run.what for run in node.scrubber.runs if run.file] == ["test"])
            for _ in range(2):
                node.held.places.release()
            await until(lambda: node.held.names() == [1, 2, 3, 4])
            command.cancel_scope.cancel()
        node.held.free = True
        await until(lambda: node.held.names() == [1, 2, 3, 4, 5, 6, 7, 8])
        nursery.cancel_scope.cancel()


async def test_a_fault_of_a_look_ends_no_node_and_is_tried_again(
    node: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    node.start(every=30 * DAY)
    original = node.held.examine

    async def fail(path: LocalPath, file: SectorFile, meter: Meter) -> Examined:
        raise ZeroDivisionError

    monkeypatch.setattr(node.held, "examine", fail)
    notes = node.notes.of(node.parts.parts.ids["disk"])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.scrubber.run_schedule)
        await until(lambda: notes.now is not None and "see the node's log" in notes.now.stopped)
        monkeypatch.setattr(node.held, "examine", original)
        await until(lambda: node.held.names() == [1, 2, 3, 4, 5, 6, 7, 8])
        nursery.cancel_scope.cancel()
    assert "ZeroDivisionError" in caplog.text


# --- disks ---


@pytest.mark.mount
async def test_a_disk_that_falls_silent_ends_its_pass_which_goes_on_later(
    tmp_path: Path,
) -> None:
    with hung_disk(tmp_path) as disk:
        async with scrub_rig(tmp_path, timeouts=TimeoutsConfig(disk=1)) as parts:
            await parts.parts.add("hung")
            await parts.sync()
            for file in PIECES[:4]:
                await parts.put("hung", file, noise(str(file), 5000), hashed=True)
            node = Node(parts)
            lane = parts.path("hung").lane
            node.held.free = False
            for _ in range(2):
                node.held.places.release()
            async with trio.open_nursery() as nursery:
                runs: list[Run] = []

                async def work() -> None:
                    runs.append(await node.scrub("hung"))

                nursery.start_soon(work)
                await until(lambda: len(node.held.looked) == 2)
                disk.hang("read")
                node.held.free = True
                node.held.places.release()
            (run,) = runs
            storage = parts.parts.ids["hung"]
            assert "no answer" in run.stopped[storage]
            notes = node.notes.of(storage)
            assert notes.now is not None
            assert notes.now.files == 2
            assert "no answer" in notes.now.stopped
            assert [told.state for told in notes.findings] == ["unreadable"]
            disk.go()
            await until(lambda: not lane.pulse.check())
            await parts.path("hung").probe()
            run = await node.scrub("hung")
            assert run.states["ok"] == 2
            assert notes.findings == []


async def test_a_path_that_is_detached_ends_its_pass(node: Node) -> None:
    node.held.free = False
    async with trio.open_nursery() as nursery:
        runs: list[Run] = []

        async def work() -> None:
            runs.append(await node.scrub("disk"))

        nursery.start_soon(work)
        await until(lambda: node.scrubber.runs and node.scrubber.runs[0].file)
        await node.parts.parts.store.detach(str(node.parts.parts.path("disk")))
        node.held.free = True
        node.held.places.release()
    assert list(runs[0].stopped.values()) == [f"{node.parts.parts.path('disk')}: was detached"]
