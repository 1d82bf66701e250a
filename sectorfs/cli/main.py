"""The command line: `sectorfs VERB …`.

Every verb takes ``--repo`` and ``--json``, before or after its name. Errors of the family are
printed as one line (or one JSON object) on stderr and become the documented exit code; so is what
the operating system or the parser of the command line says. A traceback means a fault of ours.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from sectorfs import __version__
from sectorfs.cli import (
    auth,
    caching,
    drain,
    hashing,
    node,
    output,
    piece,
    sectors,
    storage,
    verify,
    why,
)
from sectorfs.cli.context import Settings, common
from sectorfs.errors import BadInput, SectorFSError, from_os


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="sectorfs")
@common
def sectorfs(settings: Settings) -> None:
    """One mount over every storage path of a Filecoin storage cluster.

    Try it: sectorfs demo
    """


for command in (
    node.mount,
    node.serve,
    node.umount,
    node.status,
    node.demo,
    storage.storage,
    sectors.sector,
    why.why,
    hashing.hashing,
    auth.auth,
    auth.config,
):
    sectorfs.add_command(command)
for command in (
    caching.fetch,
    caching.evict,
    caching.pin,
    caching.unpin,
    piece.piece,
    verify.verify,
):
    sectors.sector.add_command(command)
storage.storage.add_command(drain.drain)


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns its exit code."""
    as_json = "--json" in arguments
    try:
        _check_text(arguments)
        result = sectorfs.main(list(arguments), prog_name="sectorfs", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except SectorFSError as exc:
        error = exc
    except click.exceptions.NoArgsIsHelpError as exc:
        click.echo(exc.format_message(), err=True)
        return BadInput.exit_code
    except click.ClickException as exc:
        error = _usage_error(exc)
    except (KeyboardInterrupt, click.Abort):
        return 130
    except OSError as exc:  # a boundary: of files that no module of ours speaks for
        error = from_os(exc, "failed", exc.filename or "sectorfs")
    output.print_error(error, as_json=as_json)
    return error.exit_code


def _check_text(arguments: Sequence[str]) -> None:
    """Refuse bytes that are no UTF-8: names and paths travel in JSON."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError as exc:
            shown = argument.encode(errors="backslashreplace").decode()
            raise BadInput("is not UTF-8", shown, "rename it, or use a link to it") from exc


def _usage_error(exc: click.ClickException) -> BadInput:
    """What is wrong with a command line."""
    context = exc.ctx if isinstance(exc, click.UsageError) else None
    verb = context.command_path if context else "sectorfs"
    return BadInput(exc.format_message().rstrip("."), verb, f"see `{verb} --help`")


def main() -> None:
    """Entry point of the program."""
    sys.exit(run(sys.argv[1:]))
