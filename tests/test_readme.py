"""The README is true: its behaviour table names tests that exist, its code map every module."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import msgspec
import pytest

from sectorfs.cli.main import sectorfs
from sectorfs.config import Config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def section(heading: str) -> str:
    """The text below a heading, up to the next of its level."""
    level = heading.split(" ")[0]
    found = re.search(
        rf"^{re.escape(heading)}\n(.*?)(?=^{level} |\Z)", README, re.MULTILINE | re.DOTALL
    )
    assert found, heading
    return found[1]


def defined_tests() -> set[str]:
    return {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
    }


def test_every_sentence_of_the_behaviour_table_has_a_test() -> None:
    rows = [line for line in section("## Behaviour").splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 20
    known = defined_tests()
    for row in rows:
        sentence, held_by = row.strip("| ").split(" | ")
        names = re.findall(r"`(test_\w+)`", held_by)
        assert names, sentence
        assert set(names) <= known, sentence


def test_every_row_on_nodes_of_other_programs_has_a_test() -> None:
    lines = section("## Nodes of other programs").splitlines()
    rows = [line for line in lines if line.startswith("| ")][2:]
    assert len(rows) > 10
    known = defined_tests()
    for row in rows:
        cells = row.strip("| ").split(" | ")
        assert len(cells) == 5, row
        names = re.findall(r"`(test_\w+)`", cells[-1])
        assert names, row
        assert set(names) <= known, row


def test_the_code_map_names_every_module_and_no_other() -> None:
    named = set(re.findall(r"^\| `([\w./]+)` \|", section("### Code map"), re.MULTILINE))
    modules = {
        str(path.relative_to(ROOT / "sectorfs"))
        for pattern in ("*.py", "*.c")
        for path in (ROOT / "sectorfs").rglob(pattern)
        if path.name not in ("__init__.py", "__main__.py")
    }
    assert named == modules


def test_the_settings_shown_are_accepted() -> None:
    blocks = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        msgspec.toml.decode(block.encode(), type=Config)


@pytest.mark.parametrize(
    "line", re.findall(r"^(?:[AB]\$ )?sectorfs ([a-z].*)$", README, re.MULTILINE)
)
def test_every_command_shown_exists(line: str) -> None:
    words = line.split("#")[0].split()
    command = sectorfs
    while words and hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    options = {name for option in command.params for name in option.opts}
    assert {word for word in words if word.startswith("-")} <= options
