"""`sectorfs mount`, `serve`, `umount`, `status`, `demo`."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import click
import trio
from rich.live import Live
from rich.text import Text

from sectorfs.cli import demo as demo_module
from sectorfs.cli import output
from sectorfs.cli.background import in_background
from sectorfs.cli.context import Location, Settings, common, run_async
from sectorfs.config import Config
from sectorfs.errors import BadInput, Unreachable
from sectorfs.node import access, unmount
from sectorfs.node.running import run_node

WATCH_PAUSE = 1.0
"""Seconds between two looks of `status --watch`."""
IGNORED_OPTIONS = (
    "ro",
    "nosuid",
    "nodev",
    "noatime",
    "_netdev",
    "nofail",
    "noauto",
    "auto",
    "user",
)
"""Options of fstab that mean nothing to the daemon, or what it does anyway."""

node_options = (
    click.option("--listen", metavar="HOST:PORT", help="Where this node serves peers."),
    click.option("--advertise", metavar="URL", help="Under which URL other nodes reach it."),
    click.option("--index", "index_url", metavar="URL", help="The cluster's Index, or `sqlite`."),
    click.option("-v", "--verbose", is_flag=True, help="Log more."),
)


def _with_node_options(function: Any) -> Any:
    for option in reversed(node_options):
        function = option(function)
    return function


@click.command()
@click.argument("mountpoint", type=Location())
@_with_node_options
@click.option("-o", "options", metavar="OPTS", default="ro", help="Mount options: ro,allow_other,…")
@click.option("--daemon", is_flag=True, help="Return once the mount answers; log to <repo>/log.")
@common
def mount(
    settings: Settings,
    mountpoint: Path,
    listen: str | None,
    advertise: str | None,
    index_url: str | None,
    verbose: bool,
    options: str,
    daemon: bool,
) -> None:
    """Run this node and mount the cluster's sectors at MOUNTPOINT.

    Example: sectorfs mount /sectors --index http://10.0.0.1:8480/rpc/v0
    """
    config = _config(settings, listen, advertise, index_url, _mount_options(options))
    target = Path(os.path.abspath(mountpoint.expanduser()))
    if daemon:
        remark = in_background(
            settings.repo.log,
            lambda ready: _run(settings, config, target, verbose, ready=ready),
        )
        if remark:
            click.echo(f"sectorfs: {remark}", err=True)
    else:
        _run(settings, config, target, verbose)


@click.command()
@_with_node_options
@common
def serve(
    settings: Settings,
    listen: str | None,
    advertise: str | None,
    index_url: str | None,
    verbose: bool,
) -> None:
    """Run this node without a mount: its paths, its Index, its files for peers.

    Example: sectorfs serve --listen 10.0.0.1:8480
    """
    _run(settings, _config(settings, listen, advertise, index_url, {}), None, verbose)


@click.command()
@click.argument("mountpoint", type=Location())
@common
def umount(settings: Settings, mountpoint: Path) -> None:
    """Unmount MOUNTPOINT and stop its node; also when the node died or hangs.

    Example: sectorfs umount /sectors
    """
    target = os.path.abspath(mountpoint.expanduser())
    how = unmount.unmount(target)
    if settings.as_json:
        output.print_json({"unmounted": target, "how": how})
    else:
        click.echo(f"unmounted {target} ({how})")


@click.command()
@click.option("--watch", is_flag=True, help="Show it again every second, until Ctrl-C.")
@common
def status(settings: Settings, watch: bool) -> int:
    """What this node does: mount, Index, storages, open files, fetches.

    Example: sectorfs status --json
    """
    if watch and sys.stdout.isatty() and not settings.as_json:
        run_async(_watch, settings)
    report = run_async(access.status, settings.repo)
    if report is None:
        error = Unreachable(
            "no node runs", settings.repo.root, "start it with `sectorfs mount` or `serve`"
        )
        if not settings.as_json:
            raise error
        output.print_json({"running": False})
        return error.exit_code
    if settings.as_json:
        output.print_json(report)
    else:
        output.print_status(output.console(), report)
    return 0


async def _watch(settings: Settings) -> NoReturn:
    with Live(console=output.console(), auto_refresh=False, screen=True) as live:
        while True:
            report = await access.status(settings.repo)
            with live.console.capture() as capture:
                if report is None:
                    live.console.print(f"no node runs on {settings.repo.root}")
                else:
                    output.print_status(live.console, report)
            live.update(Text.from_ansi(capture.get()), refresh=True)
            await trio.sleep(WATCH_PAUSE)


@click.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False), required=False)
@click.option("--once", is_flag=True, help="Show everything, clean up and end.")
@common
def demo(settings: Settings, directory: Path | None, once: bool) -> None:
    """Two nodes with sample sectors and one mount over both, on this machine.

    Example: sectorfs demo --once
    """
    demo_module.run(directory, once=once, console=output.console())


def _config(
    settings: Settings,
    listen: str | None,
    advertise: str | None,
    index_url: str | None,
    mount_values: dict[str, Any],
) -> Config:
    node = {"listen": listen, "advertise": advertise}
    return settings.repo.config().replace(
        node={key: value for key, value in node.items() if value is not None},
        index={"url": index_url} if index_url is not None else {},
        mount=mount_values,
    )


def _mount_options(text: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for option in filter(None, text.split(",")):
        name, _, value = option.partition("=")
        if name in ("uid", "gid") and value.isascii() and value.isdigit():
            values[name] = int(value)
        elif option == "allow_other":
            values["allow_other"] = True
        elif name not in IGNORED_OPTIONS and not name.startswith("x-"):
            raise BadInput(f"unknown mount option {option!r}", "-o", "the mount is read-only")
    return values


def _run(
    settings: Settings,
    config: Config,
    mountpoint: Path | None,
    verbose: bool,
    *,
    ready: Any = None,
) -> None:
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    run_async(run_node, settings.repo, config, mountpoint, ready)
