"""Options and helpers that the commands around training share."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InvalidProblem
from ..foreign import as_json, quoted, shown_lines

if TYPE_CHECKING:
    from rich.table import Table

BAR = 24
"""Characters of a bar of 100 %."""

ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads", metavar="N", help="Threads to compute with.", show_default="torch's choice"
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace a file that is there already.")]


def use_threads(threads: int | None) -> None:
    """Makes torch, and with it neocog, compute with so many; None leaves its choice."""
    import torch

    from ..settings import InvalidSetting

    if threads is None:
        return
    if threads < 1:
        raise InvalidSetting(f"--threads {threads}: expected at least 1")
    torch.set_num_threads(threads)


def say(text: str, *, err: bool = False) -> None:
    """Prints lines of plain text to stdout or stderr, see :mod:`neocog.foreign`."""
    typer.echo(shown_lines(text), err=err)


def print_json(value: Any) -> None:
    """Prints a value as JSON, which knows no NaN."""
    typer.echo(as_json(value))


class SafeLog(logging.Filter):
    """Spells out in the records of a logger what a terminal would obey."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Lets every record through, its message complete."""
        record.msg, record.args = shown_lines(record.getMessage()), ()
        return True


def check_new(path: Path | None, force: bool, option: str = "--out") -> None:
    """InvalidProblem for a file that is there already, unless it may be replaced.

    What is no plain file (a device, a pipe) is never replaced.
    """
    if path is None or not os.path.lexists(path):
        return
    if not path.is_file() and not path.is_symlink():
        raise InvalidProblem(f"{option} {path}: is no plain file, expected a new one")
    if not force:
        raise InvalidProblem(
            f"{path}: is there already; expected --force to replace it, or another name "
            f"by {option} FILE"
        )


def plain_table(title: str, **more: Any) -> Table:
    """A table with a line under its head and nothing around it."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    look: dict[str, Any] = {"title_justify": "left", "title_style": "bold", "box": SIMPLE_HEAD,
                            "padding": (0, 1, 0, 0), "pad_edge": False}  # fmt: skip
    return Table(title=title, **look, **more)


def percent(share: float) -> str:
    """``98.7 %``."""
    return f"{100 * share:.1f} %"


def bar(share: float, ascii_only: bool) -> str:
    """A bar of up to :data:`BAR` characters, to an eighth of one where the terminal can."""
    if ascii_only:
        return "#" * round(share * BAR)
    whole, part = divmod(round(share * BAR * 8), 8)
    return "█" * whole + " ▏▎▍▌▋▊▉"[part].strip()


def program() -> str:
    """How this program was called, so that what it prints can be typed as it stands."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return f"{quoted(sys.executable)} -m neocog"
    found = shutil.which(called.name)
    if found is not None and Path(found).resolve() == called.resolve():
        return called.name
    return quoted(str(called))
