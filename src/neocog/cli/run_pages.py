"""The pages that ``train`` leaves: one about a test picture read rightly, one about a wrong one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint import load_model
from ..foreign import path_of, text_of
from ..runs import Run
from ..web.page import make_page
from ..web.payload import About
from .given import Given, read_picture_for, serve_command


def write_pages(run: Run, metrics: Mapping[str, Any]) -> list[Path]:
    """The page of each example beside its picture, written unless it is there; OSError."""
    loaded = load_model(str(run.folder))
    assert loaded.in_shape is not None
    written = []
    for kind, name in metrics["examples"].items():
        if name is None:
            continue
        image = run.folder / path_of(name)
        path = image.with_suffix(".html")
        if path.exists():  # of a finished run that is resumed: nothing of it has changed
            written.append(path)
            continue
        picture = read_picture_for(str(image), Given(loaded, loaded.in_shape), str(run.folder))
        about = About(
            model=text_of(run.folder),
            image=name,
            notes=picture.notes,
            command=serve_command(str(run.folder), str(image)),
            classes=loaded.classes,
            truth=metrics["example_classes"][kind],
        )
        page = make_page(loaded.model, picture.x[None], about)
        written.append(page.save(path))
    return written
