"""Options and helpers that the commands around training share."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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


def use_threads(threads: int | None) -> None:
    """Makes torch, and with it neocog, compute with so many; None leaves its choice."""
    import torch

    from ..settings import InvalidSetting

    if threads is None:
        return
    if threads < 1:
        raise InvalidSetting(f"--threads {threads}: expected at least 1")
    torch.set_num_threads(threads)


def print_json(value: Any) -> None:
    """Prints a value as JSON, which knows no NaN."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


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
        return f"{shlex.quote(sys.executable)} -m neocog"
    found = shutil.which(called.name)
    if found is not None and Path(found).resolve() == called.resolve():
        return called.name
    return shlex.quote(str(called))
