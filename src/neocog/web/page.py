"""``neocog.explain``: a page that shows where each number of a network comes from.

One HTML file with everything in it: the style, the modules (as data: URLs of an import map, which
needs neither a bundler nor a server) and the scene as JSON. It asks the network for nothing.
"""

from __future__ import annotations

import base64
import html
import json
import logging
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import Tensor, nn

from ..errors import InvalidProblem, NeocogError
from ..files import write_atomically
from ..foreign import all_shown
from ..freezing import freeze
from ..layer_times import LayerTime, layer_times
from ..scenes import Scene, record
from .payload import BUDGET, About, payload

log = logging.getLogger("neocog")

ROUNDS = 5
"""Measurements of the layers' times; each shows a median."""
HEIGHT = 900
"""Pixels of the frame in a notebook."""


class Page:
    """A page about one picture in one network; shows itself in a notebook.

    ``data`` is what the page is made of, see :mod:`neocog.web.payload`.
    """

    def __init__(self, data: dict[str, Any], scene: Scene) -> None:
        self.data, self.scene = all_shown(data), scene

    def html(self) -> str:
        """The page as one HTML document."""
        return _template().render(
            style=_asset("style.css"),
            modules=json.dumps({"imports": _modules()}),
            scene=_script_safe(json.dumps(self.data, ensure_ascii=False, allow_nan=False)),
            title=f"{self.data['image']} in {self.data['model']}",
        )

    def save(self, path: Path | str) -> Path:
        """Writes the page to a file, whole or not at all; OSError if it cannot."""
        path = Path(path)
        write_atomically(path, self.html().encode())
        return path

    def layers(self) -> list[tuple[str, bool]]:
        """The blocks by the name of their first step, and whether their exact numbers are in it."""
        boxes = self.data["boxes"]
        found = [(boxes[b["boxes"][0]]["name"], b["exact"]) for b in self.data["blocks"]]
        return found[1:]

    def _repr_html_(self) -> str:
        """For notebooks: the page in a frame of its own."""
        inside = html.escape(self.html(), quote=True)
        style = f"width:100%;height:{HEIGHT}px;border:0"
        return f'<iframe title="neocog" srcdoc="{inside}" style="{style}"></iframe>'

    def __repr__(self) -> str:
        return f"<neocog page: {self.data['image']} in {self.data['model']}; save(path) writes it>"


def explain(
    model: nn.Module,
    image: Tensor,
    *,
    layers: Sequence[str | int] = (),
    budget: int = BUDGET,
    classes: Sequence[str] | None = None,
    name: str | None = None,
    timed: bool = True,
) -> Page:
    """A page that takes apart what ``model`` makes of ``image``.

    Args:
        model: any module; runs once, in evaluation mode and without gradients. What neocog does
            not know is shown as a plain box. One that fails is shown up to the layer that did.
        image: as the model takes it: float32 or float64, (C, H, W) or a batch of one.
        layers: layers, by name or number, whose exact numbers come before those of others.
        budget: bytes of exact numbers in the page before compression; layers beyond it are
            pictures only.
        classes: their names, in the order of the model's outputs.
        name: of the model, its class by default.
        timed: measure each layer's kernels, which compiles them.

    Raises:
        InvalidProblem: ``image`` is no picture or batch of one, or a layer in ``layers`` does not
            exist or is larger than the budget.
    """
    if not isinstance(image, Tensor) or image.dtype not in (torch.float32, torch.float64):
        raise InvalidProblem(
            "image must be a tensor of float32 or float64 as the model takes it, got "
            + type(image).__name__
            + (f" of {image.dtype}" if isinstance(image, Tensor) else "")
        )
    x = image[None] if image.ndim in (1, 3) else image
    about = About(model=name or type(model).__name__, image="image", classes=classes)
    return make_page(model, x, about, layers=layers, budget=budget, timed=timed)


def make_page(
    model: nn.Module,
    x: Tensor,
    about: About,
    *,
    layers: Sequence[str | int] = (),
    budget: int = BUDGET,
    serve: bool = False,
    timed: bool = True,
    error: NeocogError | None = None,
) -> Page:
    """The page of ``model(x)``; ``error``: why the model is only the beginning of another.

    The other arguments and the errors are those of :func:`explain` and
    :func:`neocog.web.payload.payload`.
    """
    scene = record(model, x)
    scene.error = scene.error or error
    times = measured(model, x) if timed and scene.error is None else []
    data = payload(scene, about, times, layers=layers, budget=budget, serve=serve)
    return Page(data, scene)


def measured(model: nn.Module, x: Tensor) -> list[LayerTime]:
    """The time of each layer's kernels; nothing, with a warning, for what neocog cannot freeze."""
    if x.dtype != torch.float32 or not x.is_cpu:
        return []
    training = [module for module in model.modules() if module.training]
    try:
        frozen = freeze(model.eval(), x)
        return layer_times(frozen, x.clone(), ROUNDS, torch.get_num_threads())
    except Exception as error:  # any model comes here, and a page without times is still a page
        log.warning("the layers were not timed: %s", error)
        return []
    finally:
        for module in training:
            module.training = True


@cache
def _asset(name: str) -> str:
    return (files("neocog.web") / "assets" / name).read_text(encoding="utf-8")


@cache
def _template() -> jinja2.Template:
    return jinja2.Environment(autoescape=True).from_string(_asset("page.html"))


@cache
def _modules() -> dict[str, str]:
    """The import map: ``neocog/<module>`` -> the module as a data: URL."""
    found = {}
    for file in sorted((files("neocog.web") / "assets").iterdir(), key=lambda f: f.name):
        if file.name.endswith(".js"):
            text = base64.b64encode(file.read_bytes()).decode("ascii")
            found[f"neocog/{file.name.removesuffix('.js')}"] = f"data:text/javascript;base64,{text}"
    return found


def _script_safe(text: str) -> str:
    """JSON that cannot end the script element it stands in."""
    return text.replace("<", "\\u003c")
