"""The benchmark's arithmetic and manners: pairs, medians, ratios, selection, reports, leftovers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench import __main__ as program
from tests.bench import janitor, machine, processes, report, works
from tests.bench.runner import (
    LeftOut,
    Row,
    Side,
    Spread,
    TooSlow,
    Work,
    explain,
    measure,
    select,
    spread,
    within,
)
from tests.bench.stage import Stage
from tests.cluster import until

# --- figures ---


def test_spread_of_known_values() -> None:
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(3.0, 2.0, 4.0, 1.0, 5.0)


def test_spread_of_an_even_number_of_values() -> None:
    assert spread([1.0, 2.0, 3.0, 10.0]) == Spread(2.5, 1.75, 4.75, 1.0, 10.0)


def test_spread_of_one_value_is_that_value() -> None:
    assert spread([7.0]) == Spread(7.0, 7.0, 7.0, 7.0, 7.0)


def test_spread_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no values"):
        spread([])


# --- pairs ---


class Script:
    """Sides whose figures are written down; notes who was asked when."""

    def __init__(self, ours: list[float], theirs: list[float]) -> None:
        self.asked = ""
        self._figures = {"A": iter(ours), "B": iter(theirs)}
        self.peer: Side[Script] = Side("B", lambda script: script._next("B"))
        self.work: Work[Script] = Work(
            "work", "a work", "MB/s", Side("A", lambda script: script._next("A")), (self.peer,)
        )

    def _next(self, name: str) -> float:
        self.asked += name
        return next(self._figures[name])

    def measure(self, pairs: int) -> Row:
        return measure(self.work, self.peer, self, pairs=pairs)


def test_pairs_are_taken_in_turn_and_the_first_does_not_count() -> None:
    script = Script([999.0, 10.0, 20.0, 30.0], [1.0, 5.0, 40.0, 10.0])
    row = script.measure(3)
    assert script.asked == "ABABABAB"
    assert row.pairs == ((10.0, 5.0), (20.0, 40.0), (30.0, 10.0))
    assert row.state == "measured"
    assert (row.work, row.title, row.unit, row.ours, row.peer) == (
        *("work", "a work", "MB/s"),
        *("A", "B"),
    )


def test_the_ratio_is_that_of_the_pairs_not_of_the_medians() -> None:
    """The machine got ten times slower in the middle: the pairs do not notice."""
    row = Script([1.0, 100.0, 10.0, 10.0], [1.0, 50.0, 5.0, 40.0]).measure(3)
    assert row.ours_spread is not None
    assert row.peer_spread is not None
    assert row.ratio_spread is not None
    assert row.ours_spread.median / row.peer_spread.median == 0.25
    assert row.ratio_spread.median == 2.0
    assert row.ratio_spread.minimum == 0.25


@pytest.mark.parametrize("figure", [0.0, -1.0, float("nan"), float("inf")])
def test_a_figure_that_is_no_rate_fails_its_row(figure: float) -> None:
    row = Script([1.0, 1.0], [1.0, figure]).measure(1)
    assert row.state == "failed"
    assert row.reason == f"ValueError: B measured {figure}"
    assert row.ratio_spread is None
    assert row.pairs == ()


def failing(exc: Exception) -> Side[Script]:
    def sample(script: Script) -> float:
        raise exc

    return Side("B", sample)


def test_a_failure_ends_its_row_with_the_reason() -> None:
    script = Script([1.0, 1.0], [])
    row = measure(script.work, failing(OSError("gone")), script, pairs=5)
    assert (row.state, row.reason) == ("failed", "OSError: gone")
    assert script.asked == "A"


def test_a_missing_peer_leaves_its_row_out() -> None:
    script = Script([1.0, 1.0], [])
    row = measure(script.work, failing(LeftOut("fio is not installed")), script, pairs=5)
    assert (row.state, row.reason) == ("left out", "fio is not installed")


def test_an_interrupt_ends_the_run_and_not_a_row() -> None:
    script = Script([1.0], [])

    def interrupted(script: Script) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(script.work, Side("B", interrupted), script, pairs=5)


def test_what_hangs_is_given_up() -> None:
    with pytest.raises(TooSlow, match=r"a mount took longer than 0\.05 s"):
        with within(0.05, "a mount"):
            signal.pause()
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_what_comes_in_time_leaves_no_alarm_behind() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with within(60, "a mount"):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 50
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) is before


def test_the_failure_of_a_command_tells_its_last_line() -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        processes.seconds("sh", "-c", "echo first >&2; echo no room >&2; exit 3")
    text = explain(caught.value)
    assert "exit status 3" in text
    assert "no room" in text
    assert "\n" not in text


# --- promises ---


@pytest.mark.parametrize(
    ("promise", "missed"), [(None, False), (1.99, False), (2.0, False), (2.01, True)]
)
def test_a_promise_is_kept_by_the_median_ratio(promise: float | None, missed: bool) -> None:
    script = Script([9.0, 1.0, 2.0, 4.0], [1.0, 1.0, 1.0, 1.0])
    row = measure(script.work, replace(script.peer, at_least=promise), script, pairs=3)
    assert (row.at_least, row.missed) == (promise, missed)


def test_a_promise_without_figures_is_not_kept() -> None:
    script = Script([1.0], [])
    peer = replace(failing(LeftOut("not installed")), at_least=0.5)
    assert measure(script.work, peer, script, pairs=3).missed


# --- selection ---


def two_works() -> list[Work[Script]]:
    side = Script([], []).peer
    sides = [Side(name, side.sample) for name in ("curl", "sshfs")]
    return [
        Work("fetch", "", "MB/s", side, tuple(sides)),
        Work("open", "", "files/s", side, (sides[1],)),
    ]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["fetch curl", "fetch sshfs", "open sshfs"]),
        (["fetch"], ["fetch curl", "fetch sshfs"]),
        (["sshfs"], ["fetch sshfs", "open sshfs"]),
        (["curl", "open"], ["fetch curl", "open sshfs"]),
        (["nothing"], []),
    ],
)
def test_rows_are_selected_by_work_and_peer(words: list[str], expected: list[str]) -> None:
    chosen = select(two_works(), words)
    assert [f"{work.name} {peer.name}" for work, peer in chosen] == expected


@pytest.mark.parametrize(
    ("only", "words", "expected"),
    [
        (["open"], [], ["open sshfs"]),
        (["fetch"], ["ssh"], ["fetch sshfs"]),
        (["fet"], [], []),
        (["fetch", "open"], ["curl"], ["fetch curl"]),
    ],
)
def test_rows_are_selected_by_the_whole_name_of_the_work(
    only: list[str], words: list[str], expected: list[str]
) -> None:
    chosen = select(two_works(), words, only=only)
    assert [f"{work.name} {peer.name}" for work, peer in chosen] == expected


def test_every_row_has_a_name_of_its_own() -> None:
    names = [(work.name, peer.name) for work, peer in select(works.WORKS, [])]
    assert len(set(names)) == len(names)
    assert {work.name for work in works.WORKS} >= {
        *("read-first", "read-again", "random-1", "random-16", "open-1", "ls-first", "fetch"),
        *("fr32-pad", "commp"),
    }


def test_what_is_promised_is_measured() -> None:
    promised = {
        (work.name, peer.name): peer.at_least
        for work, peer in select(works.WORKS, [])
        if peer.at_least is not None
    }
    assert promised == {
        ("read-first", "bare files"): 0.95,
        ("read-first-daemon", "mergerfs (cache.files=auto-full)"): 1.0,
        ("random-1", "bare files"): 0.85,
        ("random-16", "bare files"): 0.85,
        ("faults", "bare files"): 0.85,
        ("proof", "bare files"): 0.8,
        ("open-1", "mergerfs"): 1.0,
        ("open-4", "mergerfs"): 0.5,
        ("ls-first", "mergerfs"): 8.0,
        ("names-again", "mergerfs (cache.readdir)"): 0.8,
        ("fetch", "curl -o, sync"): 1.5,
        ("cold-first", "rclone mount"): 5.0,
        ("cold-first", "sshfs"): 1 / 3,
        ("cold-read", "rclone mount"): 2.0,
        ("cold-read", "curl -o"): 0.7,
        ("cold-crowd", "rclone mount"): 50.0,
        ("cold-crowd", "sshfs"): 0.3,
        ("cold-crowd-bulk", "without the fetch"): 1 / 3,
        ("resume", "5 % again"): 1.0,
        ("hash", "blake3 alone, read"): 0.8,
        ("verified fetch", "the same by length"): 0.85,
        ("verified random", "the same by length"): 0.7,
        ("scrub", "cat"): 0.9,
        ("million-start", "15 s"): 1.0,
        ("million-memory", "600 MiB"): 1.0,
        ("million-list", "6 s"): 1.0,
    }


# --- reports ---


def quiet() -> machine.Machine:
    return machine.Machine(
        processor="Z80",
        cores=2,
        memory=24 << 30,
        kernel="6.18",
        distribution="Debian",
        python="3.11.2",
        file_system="ext4 /dev/vda",
        native_modules=True,
        versions={"sectorfs": "0.1.0", "fio": "3.33"},
        load=(0.1, 0.2, 0.3),
        busy=0.01,
    )


def sample_report() -> report.Report:
    measured = Script([1.0, 1000.0, 1100.0, 1200.0], [1.0, 500.0, 500.0, 400.0]).measure(3)
    broken = Script([1.0], [])
    return report.Report(
        schema=report.SCHEMA,
        started="2026-01-02T03:04:05Z",
        seconds=12.5,
        machine=quiet(),
        rows=[
            measured,
            replace(measured, at_least=2.0),
            replace(measured, at_least=2.5),
            measure(broken.work, failing(OSError("a | b")), broken, pairs=1),
            measure(broken.work, failing(LeftOut("not here")), Script([1.0], []), pairs=1),
        ],
    )


def test_json_comes_back_as_it_went() -> None:
    whole = sample_report()
    assert report.decode(report.encode(whole)) == whole


def test_json_has_the_figures_and_the_reasons() -> None:
    data = json.loads(report.encode(sample_report()))
    first, _, promised, failed, left_out = data["rows"]
    assert first["pairs"] == [[1000, 500], [1100, 500], [1200, 400]]
    assert first["ratio_spread"]["median"] == 2.2
    assert promised["at_least"] == 2.5
    assert (failed["state"], failed["pairs"], failed["ratio_spread"]) == ("failed", [], None)
    assert left_out["state"] == "left out"
    assert data["machine"]["cores"] == 2
    assert data["schema"] == report.SCHEMA


def test_only_failures_count_as_failed() -> None:
    assert [row.reason for row in sample_report().failed] == ["OSError: a | b"]


def test_the_table() -> None:
    lines = report.markdown(sample_report()).splitlines()
    figures = "| a work | 1 100 MB/s (1 050–1 150) | B: 500 MB/s (450–500) | **2.20** (2.10–2.60) |"
    assert lines[:7] == [
        "| work | sectorfs | peer | ratio | promised |",
        "| --- | --- | --- | --- | --- |",
        f"{figures}  |",
        f"{figures} 2: met |",
        f"{figures} 2.5: **missed** |",
        "| a work | – | B | failed: OSError: a \\| b |  |",
        "| a work | – | B | left out: not here |  |",
    ]
    text = "\n".join(lines[7:])
    assert "of 3 pairs" in text
    assert "2 cores (Z80), 24 GiB, Linux 6.18" in text
    assert "sectorfs 0.1.0, fio 3.33" in text
    assert "Doubtful" not in text


def test_what_was_promised_and_missed_is_named() -> None:
    assert [row.at_least for row in sample_report().missed] == [2.5]


def test_the_table_of_a_busy_machine_says_so() -> None:
    whole = sample_report()
    whole.machine.warnings.append("the machine is busy")
    assert "**Doubtful: the machine is busy.**" in report.markdown(whole)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.1234, "0.123"),
        (65.17, "65.2"),
        (123.4, "123"),
        (1234.0, "1 230"),
        (849_012.0, "849 000"),
        (1_020_304.0, "1 020 000"),
    ],
)
def test_figures_have_three_digits(value: float, text: str) -> None:
    assert report.number(value) == text


def test_the_report_is_written_where_no_directory_was(tmp_path: Path) -> None:
    path = tmp_path / "build" / "deep" / "bench.json"
    report.write(sample_report(), path)
    assert report.decode(path.read_bytes()).seconds == 12.5


# --- the machine ---


def test_the_machine_is_described(tmp_path: Path) -> None:
    here = machine.describe(tmp_path)
    assert here.cores == os.cpu_count()
    assert here.memory > 1 << 27
    assert here.kernel == os.uname().release
    assert here.file_system != "unknown"
    assert here.versions["sectorfs"].startswith("0.")
    assert 0 <= here.busy <= 1


@pytest.mark.parametrize(
    ("load", "busy", "count"), [(0.0, 0.0, 0), (0.9, 0.1, 0), (1.5, 0.1, 1), (1.5, 0.9, 2)]
)
def test_a_busy_machine_is_warned_of(load: float, busy: float, count: int) -> None:
    assert len(machine.judge(load, busy, cores=2)) == count


def test_the_busy_share_of_the_processors() -> None:
    before = "cpu  100 0 100 1000 50 0 0 0 7 7\ncpu0 1 1\n"
    after = "cpu  120 0 110 1060 60 0 0 0 9 9\ncpu0 1 1\n"
    assert machine.share_busy(before, after) == pytest.approx(0.3)
    assert machine.share_busy(before, before) == 0.0


@pytest.mark.parametrize(
    ("text", "name", "version"),
    [
        ("fusermount3 version: 3.14.0\nSSHFS version 3.7.3\n", "sshfs", "3.7.3"),
        ("fio-3.33", "fio", "3.33"),
        ("OpenSSH_9.2p1 Debian-2, OpenSSL 3.0.19", "OpenSSH", "9.2p1"),
        ("rclone v1.60.1-DEV\n- os/version: debian 12.1", "rclone", "1.60.1"),
        ("sha256sum (GNU coreutils) 9.1", "coreutils", "9.1"),
        ("nothing", "fio", "unknown"),
    ],
)
def test_versions_are_found_in_what_programs_say(text: str, name: str, version: str) -> None:
    assert machine.version_in(text, name) == version


def test_versions_of_missing_programs_are_left_out() -> None:
    assert machine._versions({"none": ("no-such-program", "-V")}) == {}


# --- programs ---


def test_a_missing_program_leaves_its_rows_out() -> None:
    with pytest.raises(LeftOut, match="no-such-program is not installed"):
        processes.program("no-such-program")


def test_a_program_runs_while_the_block_does(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    command = ("sh", "-c", f"echo $$ > {ready}.new; mv {ready}.new {ready}; exec sleep 600")
    with processes.running(*command, log=tmp_path / "log", ready=ready.exists):
        pid = int(ready.read_text())
        assert Path(f"/proc/{pid}").exists()
    assert not Path(f"/proc/{pid}").exists()


def test_a_program_that_does_not_run_leaves_its_rows_out_with_what_it_said(tmp_path: Path) -> None:
    command = ("sh", "-c", "echo no such user; exit 1")
    with pytest.raises(LeftOut, match="sh does not run here: no such user"):
        with processes.running(*command, log=tmp_path / "log", ready=lambda: False):
            pytest.fail("it never ran")


def test_a_stage_that_fails_once_fails_the_same_way_again(tmp_path: Path) -> None:
    calls = []

    def make() -> int:
        calls.append(1)
        raise LeftOut("no")

    with Stage(tmp_path, links=1) as stage:
        for _ in range(2):
            with pytest.raises(LeftOut):
                stage._once("thing", make)
    assert len(calls) == 1


# --- the load ---


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., float]]:
    """The program that makes load, on paths for a moment."""
    with Stage(tmp_path_factory.mktemp("load"), links=1) as stage:
        program = stage.load

        def call(work: str, threads: int, *paths: Path) -> float:
            names = "".join(f"{path}\n" for path in paths)
            return float(processes.said(program, work, str(threads), "0.05", given=names))

        yield call


@pytest.mark.parametrize("work", ["pread", "fault", "open"])
@pytest.mark.parametrize("threads", [1, 5])
def test_load_on_files(tmp_path: Path, load: Callable[..., float], work: str, threads: int) -> None:
    paths = [tmp_path / str(number) for number in range(3)]
    for path in paths:
        path.write_bytes(bytes(1 << 17))
    assert load(work, threads, *paths) > 0


def test_load_counts_the_names_of_a_directory(tmp_path: Path, load: Callable[..., float]) -> None:
    few, many = tmp_path / "few", tmp_path / "many"
    for folder, count in ((few, 1), (many, 3000)):
        folder.mkdir()
        for number in range(count):
            (folder / str(number)).touch()
    assert load("list", 1, many) > 0
    # The names of 3 and of 3002 entries: some passes over each.
    assert load("list", 2, few, many) > 0


@pytest.mark.parametrize(
    ("work", "content", "said"),
    [
        ("pread", None, "No such file"),
        ("pread", b"short", "size of"),
        ("open", b"short", "read"),
        ("fault", bytes(4096), "too small"),
        ("list", b"a file", "Not a directory"),
        ("nonsense", b"", "usage"),
    ],
)
def test_load_that_cannot_be_made_fails(
    tmp_path: Path, load: Callable[..., float], work: str, content: bytes | None, said: str
) -> None:
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(subprocess.CalledProcessError) as caught:
        load(work, 1, path)
    assert said in caught.value.stderr


def test_load_on_nothing_fails(load: Callable[..., float]) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        load("open", 1)


# --- leftovers ---


@pytest.fixture
def root() -> Iterator[Path]:
    """A directory as a benchmark makes it."""
    path = Path(tempfile.mkdtemp(prefix=janitor.PREFIX)).resolve()
    yield path
    janitor.clean(path)


def start_marked(root: Path, code: str) -> subprocess.Popen[bytes]:
    """A Python process that does `code` and then waits, started by the benchmark of `root`."""
    code = f"import signal, pathlib\n{code}\npathlib.Path({str(root / 'up')!r}).touch()\n"
    process = subprocess.Popen(
        [sys.executable, "-c", code + "signal.pause()"],
        env={**os.environ, janitor.MARK: str(root)},
    )
    until("the process to be up", (root / "up").exists)
    return process


def test_cleaning_up_ends_processes_and_removes_files(root: Path) -> None:
    (root / "file").touch()
    process = start_marked(root, "")
    other = subprocess.Popen(["sleep", "600"])
    try:
        janitor.clean(root)
        assert process.wait(10) == -signal.SIGTERM
        assert not root.exists()
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


@pytest.mark.mount
def test_cleaning_up_takes_mounts_away_before_it_removes_files(root: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.touch()
    inner = root / "mounts" / "inner"
    inner.mkdir(parents=True)
    subprocess.run(["mount", "--bind", tmp_path, inner], check=True)
    janitor.clean(root)
    assert precious.exists()
    assert not root.exists()
    assert str(root) not in Path("/proc/self/mountinfo").read_text()


def test_cleaning_up_refuses_any_other_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no directory of a benchmark"):
        janitor.clean(tmp_path)
    assert tmp_path.exists()


def test_a_killed_benchmark_is_cleaned_up_after(root: Path) -> None:
    code = (
        "import pathlib, signal, subprocess, sys\n"
        "from tests.bench.janitor import watched\n"
        f"root = pathlib.Path({str(root)!r})\n"
        "with watched(root):\n"
        "    child = subprocess.Popen(['sleep', '600'])\n"
        "    print(child.pid, flush=True)\n"
        "    signal.pause()\n"
    )
    benchmark = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert benchmark.stdout is not None
    with benchmark.stdout as stdout:
        child = int(stdout.readline())
        benchmark.kill()
        benchmark.wait()
    until("the directory to be gone", lambda: not root.exists())
    until("the child to be gone", lambda: not Path(f"/proc/{child}").exists())


def test_the_mark_does_not_outlive_the_run(root: Path) -> None:
    with janitor.watched(root):
        assert os.environ[janitor.MARK] == str(root)
    assert janitor.MARK not in os.environ
    assert not root.exists()


# --- the command ---


def run(*arguments: str) -> int:
    return program.main(arguments)


def test_list_shows_the_rows_and_measures_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--list", "--only", "fetch") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["fetch"] * 5
    assert "curl -o, sync" in lines[1]


def test_a_word_that_selects_nothing_is_bad_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-k", "nonsense") == 2
    assert "no row's name contains nonsense" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--pairs", "0"], ["--pairs", "501"], ["--pairs", "x"], ["--nonsense"]]
)
def test_bad_options_are_bad_use(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    assert "usage: make bench" in capsys.readouterr().err


def test_a_missing_directory_is_bad_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--dir", str(tmp_path / "none")) == 2
    assert "no such directory" in capsys.readouterr().err


def test_a_full_disk_is_bad_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "NEEDED", 1 << 62)
    assert run("--dir", str(tmp_path)) == 2
    assert "MiB free" in capsys.readouterr().err


@pytest.fixture
def benchmark(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The whole program, on the quick rows that need no node."""

    def call(*arguments: str, timeout: float = 100) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                *(sys.executable, "-m", "tests.bench", "--pairs", "1"),
                *("--dir", str(tmp_path), "--json", str(tmp_path / "out.json"), *arguments),
            ],
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return call


@pytest.mark.mount
def test_a_run_prints_its_table_writes_its_json_and_leaves_nothing(
    tmp_path: Path, benchmark: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = benchmark("-k", "fr32-pad")
    assert done.returncode == 0, done.stderr
    assert "| fr32: pad |" in done.stdout
    assert "1 pairs say little" in done.stderr
    written = report.decode((tmp_path / "out.json").read_bytes())
    assert [row.state for row in written.rows] == ["measured"]
    assert written.machine.cores == os.cpu_count()
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


@pytest.mark.mount
def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.bench", "--pairs", "500", "-k", "fr32-pad"]
    process = subprocess.Popen([*command, "--dir", str(tmp_path)], stderr=subprocess.DEVNULL)
    until("the run to begin", lambda: list(tmp_path.glob("*/payload")))
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
@pytest.mark.mount
def test_every_row_is_measured_or_left_out(
    tmp_path: Path, benchmark: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """All works on real nodes, and beside those peers that are installed."""
    done = benchmark(timeout=1100)
    rows = report.decode((tmp_path / "out.json").read_bytes()).rows
    assert [(row.title, row.reason) for row in rows if row.state == "failed"] == []
    assert len(rows) == len(select(works.WORKS, []))
    assert any(row.state == "measured" for row in rows if row.work == "open-1")
    assert done.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
