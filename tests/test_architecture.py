"""The house holds: imports point down, foreign names stay in their module, threads where named."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sectorfs"

LAYERS = [
    {"types", "metrics"},
    {"errors"},
    {"config"},
    {"wire"},
    {"index"},
    {"stores"},
    {"fuse", "manager", "hosts"},
    {"server", "web"},
    {"node"},
    {"cli"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

ONLY_IN = {
    "pyfuse3": {"fuse.operations"},
    "h11": {"wire"},
    "sqlite3": {"index.sqlite"},
    "psycopg": {"index.postgres"},
    "blake3": {"stores.manifest"},
    "jwt": {"wire.tokens"},
    "inotify_simple": {"stores.watch"},
    "click": {"cli"},
    "rich": {"cli"},
    "asyncio": set(),
}
THREADS = {
    "stores.calls",  # all disk work of stores and handles, bounded per storage by its lane
    "stores.lanes",  # one thread per storage that closes descriptors
    "index.sqlite",  # one writer
    "fuse.operations",  # kernel notifications, and the end of a mount
    "node.stop",  # the last resort of a stop: ends a process whose loop or disk hangs
}


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if name and name != "__main__":
            yield name, path


MODULES = dict(modules())


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path: Path) -> set[str]:
    """Modules of this package that a file imports, without the ``sectorfs.`` in front."""
    names = {name.removeprefix("sectorfs.") for name in imports(path) if "sectorfs." in name}
    return {name for name in names if name in MODULES}


@pytest.mark.parametrize("name", MODULES)
def test_every_module_has_a_layer_and_a_docstring(name: str) -> None:
    assert name.split(".")[0] in RANK
    path = MODULES[name]
    if path.name != "__init__.py" or path.read_text():
        assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name: str) -> None:
    package = name.split(".")[0]
    for other in own_imports(MODULES[name]):
        target = other.split(".")[0]
        if target != package:
            assert RANK[target] < RANK[package], f"{name} imports {other}"


def test_imports_have_no_circle() -> None:
    graph = {name: own_imports(path) - {name} for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " → ".join((*trail, name))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("name", MODULES)
def test_foreign_names_stay_in_their_module(name: str) -> None:
    for foreign in imports(MODULES[name]):
        allowed = ONLY_IN.get(foreign.split(".")[0])
        if allowed is not None:
            assert name in allowed or name.split(".")[0] in allowed, f"{name} imports {foreign}"


@pytest.mark.parametrize("name", MODULES)
def test_threads_only_where_they_are_named(name: str) -> None:
    tree = ast.parse(MODULES[name].read_text())
    used = {
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and ast.unparse(node)
        in {
            "trio.to_thread",
            "trio.lowlevel.start_thread_soon",
            "threading.Thread",
            "threading.Timer",
            "concurrent.futures",
        }
    }
    assert not used or name in THREADS, f"{name} uses {used}"


@pytest.mark.parametrize("name", MODULES)
def test_vague_names_and_globals_stay_out(name: str) -> None:
    assert not set(name.split(".")) & {"utils", "helpers", "common", "base", "misc"}
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        assert not isinstance(node, ast.Global), f"{name} rebinds a module variable"


def logs(body: list[ast.stmt], tree: ast.Module) -> bool:
    """True when statements log or raise, themselves or in a function of their module they call."""
    source = "\n".join(ast.unparse(statement) for statement in body)
    if "log." in source or "raise" in source:
        return True
    called = {
        node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
        for statement in body
        for node in ast.walk(statement)
        if isinstance(node, ast.Call)
    }
    return any(
        "log." in ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name in called
    )


def test_broad_excepts_stand_at_boundaries_only() -> None:
    """Handlers, requests and long-lived tasks; each of them logs."""
    for name, path in MODULES.items():
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler) and node.type is not None:
                broad = ast.unparse(node.type) == "Exception"
                assert not broad or logs(node.body, tree), f"{name}:{node.lineno} swallows"


def test_top_level_holds_nothing_else() -> None:
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    top = {line.split("/")[0] for line in tracked}
    licenses = {name for name in top if name.startswith("LICENSE-")}
    assert licenses
    assert top - licenses <= {
        "pyproject.toml",
        "sectorfs",
        "tests",
        "systemd",
        "README.md",
        "Makefile",
        ".ci",
        ".gitignore",
    }


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["mypy"],
    ],
    ids=lambda command: " ".join(command),
)
def test_checkers_find_nothing(command: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
