"""The ``neocog`` command: its subcommands, and what becomes of their errors.

Whatever is the user's to put right ends in one line on stderr, ``error: ...``, and exit code 2;
Ctrl-C in exit code 130. Anything else is a mistake of neocog's own and shows its traceback.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from ..errors import NeocogError
from ..foreign import shown, shown_lines
from .shared import SafeLog

PATIENT = frozenset({"train", "evaluate", "predict"})
"""Commands whose OpenMP threads sleep while they wait for one another.

By default they spin, which saves microseconds as long as every thread has a core of its own. Where
it has not, the one that is waited for does not get to run: with three other processes on two cores
an epoch of ``train`` took 24 to 36 seconds, and 3 to 5 with threads that sleep.
"""


_LOG = SafeLog()
_UsageError: Any = typer.BadParameter.__base__


@contextmanager
def _usage_shown() -> Iterator[None]:
    """Wrong usage names the words that were typed, or that a shell found in a folder for ``*``."""
    try:
        yield
    except _UsageError as error:
        error.message = shown_lines(error.message)
        raise


class ErrorsInOneLine(TyperGroup):
    """A group of commands that reports expected errors without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command; NeocogError and OSError become a line and exit code 2."""
        try:
            with _usage_shown():
                return super().invoke(ctx)
        except BrokenPipeError:  # `neocog ... | head`: Typer ends quietly
            raise
        except (NeocogError, OSError) as error:
            typer.echo(f"error: {_in_one_line(error)}", err=True)
            raise typer.Exit(2) from error

    def make_context(self, *args: Any, **options: Any) -> Any:
        """The options before the command."""
        with _usage_shown():
            return super().make_context(*args, **options)


def _print_version(value: bool) -> None:
    if value:
        torch = metadata.version("torch")  # asked for without importing it, which takes seconds
        typer.echo(f"neocog {__version__} (torch {torch})")
        raise typer.Exit()


def build_app() -> typer.Typer:
    """The whole command line."""
    from . import exporting, looking, machine, reading, training

    app = typer.Typer(
        name="neocog",
        cls=ErrorsInOneLine,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(neocog)
    for module in (training, reading, looking, exporting, machine):
        module.register(app)
    return app


def neocog(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    """Convolution and pooling layers for PyTorch, compiled for each layer."""
    logging.getLogger("neocog").addFilter(_LOG)


def main() -> None:
    """Runs the command line of this process."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what its encoding lacks is spelled out
            stream.reconfigure(errors="backslashreplace")
    if sys.argv[1:] and sys.argv[1] in PATIENT:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is first imported
    build_app()()


def _in_one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return shown(f"{error.filename}: {error.strerror}")
    return shown(str(error).strip())
