"""Limits of bytes per second: bulk work keeps to them, readers are charged and never wait."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from sectorfs.config import Config
from sectorfs.errors import BadConfig
from sectorfs.stores.lanes import Descriptor, Lane
from sectorfs.stores.transfer import PeerClient
from sectorfs.wire.client import Client
from sectorfs.wire.rates import Bucket, Rates, Throttle
from tests.test_transfer import CACHE, SEALED, our_node, target
from tests.test_transfer_ranges import into
from tests.wire_fixtures import PATIENT

MIB = 1 << 20


@given(
    st.integers(1, 10**9),
    st.lists(st.tuples(st.floats(0, 10), st.integers(-(10**9), 10**9)), max_size=50),
)
def test_a_bucket_owes_and_saves_little(rate: int, steps: list[tuple[float, int]]) -> None:
    now = 0.0
    bucket = Bucket(rate, now)
    for passed, count in steps:
        now += passed
        bucket.charge(count, now)
        wait = bucket.wait(now)
        assert 0 <= wait <= 2 + 1e-6
        assert bucket.wait(now + wait + 1e-3) <= 1 / rate


def test_a_bucket_lets_through_what_its_rate_says() -> None:
    bucket, now, through = Bucket(1000, 0.0), 0.0, 0
    while now < 10:
        wait = bucket.wait(now)
        if wait:
            now += wait
        else:
            bucket.charge(100, now)
            through += 100
    assert 10_000 <= through <= 10_500


def limited(rates: Rates, peer: str = "a:1") -> Throttle:
    throttle = rates.of(peer)
    assert throttle is not None
    return throttle


async def take(throttle: Throttle, count: int) -> None:
    while count > 0:
        count -= await throttle.turn()


def test_no_limit_is_no_throttle() -> None:
    assert Rates().of("a:1") is None


async def test_several_share_the_rate_of_their_peer(
    autojump_clock: trio.testing.MockClock,
) -> None:
    rates = Rates(peer=4 * MIB)
    assert limited(rates) is limited(rates)
    start = trio.current_time()
    ends = []

    async def fetch(peer: str) -> None:
        await take(limited(rates, peer), 10 * MIB)
        ends.append((peer, trio.current_time() - start))

    async with trio.open_nursery() as nursery:
        for peer in ("a:1", "a:1", "b:1"):
            nursery.start_soon(fetch, peer)
    times = {"a:1": [end for peer, end in ends if peer == "a:1"], "b:1": [ends[0][1]]}
    assert ends[0][0] == "b:1"
    assert times["b:1"] == [pytest.approx(2.5, abs=0.5)]
    assert times["a:1"] == [pytest.approx(5, abs=0.5)] * 2  # side by side, not one by one


async def test_all_peers_share_the_rate_of_the_node(
    autojump_clock: trio.testing.MockClock,
) -> None:
    rates = Rates(peer=100 * MIB, node=4 * MIB)
    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        for peer in "abcd":
            nursery.start_soon(take, limited(rates, peer), 5 * MIB)
    assert trio.current_time() - start == pytest.approx(5, abs=0.5)


async def test_bulk_waits_for_readers_and_not_forever(
    autojump_clock: trio.testing.MockClock,
) -> None:
    throttle = limited(Rates(node=MIB))
    throttle.charge(MIB)  # at once: nobody waits here
    start = trio.current_time()
    await throttle.turn()
    assert trio.current_time() - start == pytest.approx(0.75, abs=0.1)
    throttle.charge(1000 * MIB)
    start = trio.current_time()
    await throttle.turn()
    assert trio.current_time() - start == pytest.approx(2, abs=0.1)


async def test_a_turn_given_up_costs_nobody_anything(
    autojump_clock: trio.testing.MockClock,
) -> None:
    rates = Rates(peer=MIB, node=MIB)
    limited(rates, "other").charge(MIB)  # the node's share is used up, the peer's is not
    throttle = limited(rates)
    for _ in range(100):
        with trio.move_on_after(0.001):
            await throttle.turn()
            raise AssertionError
    start = trio.current_time()
    await throttle.turn()
    assert trio.current_time() - start < 1


async def test_what_a_turn_did_not_use_is_given_back(
    autojump_clock: trio.testing.MockClock,
) -> None:
    throttle = limited(Rates(peer=MIB))
    start = trio.current_time()
    for _ in range(1000):
        throttle.charge(100 - await throttle.turn())
    assert trio.current_time() - start < 0.1


async def test_transfers_keep_to_the_rate(tmp_path: Path) -> None:
    rate, lane = 2 * MIB, Lane("disk", deadline=5)
    async with our_node(tmp_path) as (plain, base):
        token = plain._client._token
        async with Client(PATIENT, token=token, rates=Rates(peer=rate)) as client:
            peers = PeerClient(client)

            async def bulk(descriptor: Descriptor, *, whole: bool) -> float:
                start = time.monotonic()
                if whole:
                    await peers.fetch(
                        base,
                        SEALED,
                        None,
                        descriptor,
                        size=2_000_000,
                        mtime_ns=None,
                        run=lane.finish,
                    )
                else:
                    span = (0, 2_000_000)
                    await peers.receive(
                        base, SEALED, None, span, descriptor, expect=None, run=lane.finish
                    )
                return time.monotonic() - start

            with target(tmp_path / "copy") as descriptor:
                for whole in (True, False):
                    # what a bucket saves up is free, and so is what comes with the header
                    assert await bulk(descriptor, whole=whole) > 2_000_000 / rate - 0.5
            assert (tmp_path / "copy").read_bytes() == (tmp_path / str(SEALED)).read_bytes()


async def test_reads_wait_for_no_turn_and_are_charged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    charged: list[int] = []

    async def no_turn(throttle: Throttle) -> int:
        raise AssertionError

    monkeypatch.setattr(Throttle, "turn", no_turn)
    monkeypatch.setattr(Throttle, "charge", lambda throttle, count: charged.append(count))
    async with our_node(tmp_path) as (plain, base):
        token = plain._client._token
        async with Client(PATIENT, token=token, rates=Rates(node=MIB)) as client:
            peers = PeerClient(client)
            assert len(await peers.read(base, SEALED, None, 0, 64)) == 64
            for spans in ([(3, 5)], [(0, 5), (9, 12)]):
                found: dict[int, bytes] = {}
                await peers.ranges(
                    base, CACHE, "p_aux", spans, expect=None, leaves=False, deliver=into(found)
                )
                assert found == {start: b"p" * (end - start) for start, end in spans}
    assert charged == [64, 2, 8]


@pytest.mark.parametrize("rate", ["1KiB", "many", "-1", "10%"])
@pytest.mark.parametrize("section", ["peers", "fetch"])
def test_rates_that_cannot_be_used(section: str, rate: str) -> None:
    with pytest.raises(BadConfig, match=f"{section}.max_rate"):
        Config().replace(**{section: {"max_rate": rate}})


def test_rates_that_can() -> None:
    config = Config().replace(peers={"max_rate": "100MB"}, fetch={"max_rate": "1GiB"})
    assert (config.peers.max_rate, config.fetch.max_rate) == ("100MB", "1GiB")
