"""The commands about this machine: ``bench`` and ``doctor``."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
