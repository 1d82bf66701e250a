"""Options that every verb shares, and the way to the node or repo it acts on."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec
import trio

from sectorfs.errors import BadInput, SectorFSError
from sectorfs.node import access
from sectorfs.node.admin import Admin
from sectorfs.node.repo import Repo

T = TypeVar("T")

DEFAULT_REPO = "~/.sectorfs"
_REPO_HINT = "set SECTORFS_PATH, or give --repo"


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What the shared options said."""

    repo: Repo
    as_json: bool


class Location(click.ParamType[Path]):
    """A path as it was typed. `click.Path` looks at it, and a dead mount or disk never answers."""

    name = "path"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> Path:
        """Take the path; an empty one is refused."""
        text = str(value)
        if not text:
            self.fail("an empty path", param, ctx)
        return Path(text)


def common(function: Callable[..., T]) -> Callable[..., T]:
    """Add ``--repo`` and ``--json``; what stands after the verb beats what stands before."""

    def wrapper(context: click.Context, /, repo: Path | None, as_json: bool, **values: Any) -> T:
        outer = context.obj if isinstance(context.obj, Settings) else None
        if repo is not None:
            chosen = Repo(repo)
        elif outer is not None:
            chosen = outer.repo
        else:
            chosen = Repo(_default_repo())
        settings = Settings(repo=chosen, as_json=as_json or (outer is not None and outer.as_json))
        context.obj = settings
        return function(settings, **values)

    verb: Callable[..., T] = functools.update_wrapper(click.pass_context(wrapper), function)
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
        click.option(
            "--repo",
            type=click.Path(file_okay=False, path_type=Path),
            help=f"The node's directory.  [default: $SECTORFS_PATH or {DEFAULT_REPO}]",
        ),
    ):
        verb = option(verb)
    return verb


def _default_repo() -> Path:
    path = Path(os.environ.get("SECTORFS_PATH") or DEFAULT_REPO)
    try:
        os.fspath(path).encode()
        return path.expanduser()
    except (UnicodeEncodeError, RuntimeError) as exc:  # the latter: no home directory is known
        raise BadInput(f"not the name of a directory: {exc}", "SECTORFS_PATH", _REPO_HINT) from exc


def run_async(function: Callable[..., Awaitable[T]], *arguments: Any) -> T:
    """Run an async function; of the errors it leaves with, the first deliberate one is raised."""
    try:
        return trio.run(function, *arguments)
    except BaseExceptionGroup as group:
        raise _single(group) from group


def _single(group: BaseExceptionGroup[BaseException]) -> BaseException:
    leaf: BaseException = group.subgroup(SectorFSError) or group
    while isinstance(leaf, BaseExceptionGroup):
        leaf = leaf.exceptions[0]
    return leaf


def with_admin(settings: Settings, work: Callable[[Admin], Awaitable[T]]) -> T:
    """Do `work` on the running node, or on the repo directory when none runs."""

    async def run() -> T:
        async with access.open_admin(settings.repo) as admin:
            return await work(admin)

    logging.basicConfig(level=logging.WARNING, format="sectorfs: %(message)s")
    return run_async(run)
