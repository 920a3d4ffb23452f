"""The command line: ``torchconv compare | inspect | swap | merge | export | list | show | search | claim | bench``."""

from __future__ import annotations

import sys
from functools import cache
from typing import Annotated, NoReturn

import typer

from torchconv._common.extras import extra_of
from torchconv._version import __version__

app = typer.Typer(
    name="torchconv",
    help="Which convolution should I use for my data, my hardware, my budget?",
    epilog="First steps:  torchconv compare   |   torchconv search long range   |   torchconv show dcls",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"torchconv {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options before the command."""


@cache
def _register() -> None:
    from torchconv.cli import bench, catalogue, claims, compare, export, factorise, inspect, merge, swap

    for module in (compare, inspect, swap, merge, factorise, export, catalogue, claims, bench):
        module.register(app)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line; an error is one line on standard error and exit status 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # --debug works wherever it stands.
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"] or ["--help"]
    _register()
    try:
        status = app(arguments, standalone_mode=False) or 0
        if status == 130:  # Ctrl-C, of which click makes a status
            raise KeyboardInterrupt
        sys.exit(status)
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("interrupted", err=True)
        sys.exit(130)
    except Exception as error:
        # Wrong options: typer's errors, whichever click it stands on, can say themselves in one line.
        wrong_usage = getattr(error, "format_message", None)
        if debug or not (wrong_usage or isinstance(error, ValueError | OSError | ImportError | RuntimeError)):
            raise
        if wrong_usage:
            command = getattr(getattr(error, "ctx", None), "command_path", "torchconv")
            _fail(f"{wrong_usage()} (see {command} --help)")
        _fail(_missing(error) or str(error) or type(error).__name__)


def _missing(error: Exception) -> str:
    """What to install, where a package that an extra brings is missing."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return ""
    extra = extra_of(error.name)
    return f"{error.name} is not installed; run: pip install 'torchconv[{extra}]'" if extra else ""


def _fail(message: str) -> NoReturn:
    typer.echo(f"torchconv: {' '.join(message.split())}", err=True)
    sys.exit(2)
