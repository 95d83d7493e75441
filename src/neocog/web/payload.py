"""A scene as the data of the page: plain values, and arrays as compressed bytes.

What each block gives is there as a picture of 8 bits a value. Blocks are *exact* as far as a budget
of bytes goes: all their maps and weights, and the maps they read, as float32, so that the page can
do the arithmetic. The rest is to be had from the server (:mod:`neocog.web.server`).
"""

from __future__ import annotations

import base64
import math
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import network as net
from ..activations import ACTIVATIONS
from ..errors import InvalidProblem
from ..geometry import Window
from ..layer_times import LayerTime
from ..layers import Stage
from ..problem import Conv, Pool
from ..scenes import Box, Scene
from ..sight import Field

BUDGET = 8_000_000
"""Bytes of exact numbers in a page, before they are compressed."""


@dataclass(frozen=True)
class About:
    """What the page says about its model and picture.

    ``command`` serves the same page with all its numbers. ``classes`` are the names of the classes,
    ``truth`` the right one's position, both None if not known.
    """

    model: str
    image: str
    notes: tuple[str, ...] = ()
    command: str = ""
    classes: Sequence[str] | None = None
    truth: int | None = None


def payload(
    scene: Scene,
    about: About,
    times: Sequence[LayerTime] = (),
    *,
    layers: Sequence[str | int] = (),
    budget: int = BUDGET,
    serve: bool = False,
) -> dict[str, Any]:
    """The data of the page.

    Args:
        scene: what happened in the network.
        about: names and notes.
        times: of the layers, if they were measured.
        layers: names or numbers (as ``summary`` counts) of layers to be exact before all others.
        budget: bytes of exact numbers, not counting the picture.
        serve: the page asks a server for exact numbers; none are in it.

    Raises:
        InvalidProblem: a layer in ``layers`` that does not exist, or does not fit the budget.
    """
    blocks = scene.blocks()
    exact = set() if serve else _exact(scene, blocks, layers, budget)
    own = {i for number in exact for i in blocks[number]}
    wanted = {0} | {i for box in own for i in (box, *scene.boxes[box].inputs)}
    named = Counter(t.weight for t in times)
    timed = {t.weight: t for t in times if t.weight and named[t.weight] == 1}
    shown = wanted | {block[-1] for block in blocks}
    boxes = [_box(scene, i, i in shown, i in wanted, i in own) for i in range(len(scene.boxes))]
    for index in _again(scene):
        boxes[index] |= {"weights": 0, "biases": 0}
    probabilities = _probabilities(scene)
    return {
        **asdict(about),
        "classes": _fitting(about.classes, probabilities),
        "serve": serve,
        "boxes": boxes,
        "blocks": [
            {"boxes": block, "exact": serve or number in exact, **_time(scene, block, timed)}
            for number, block in enumerate(blocks)
        ],
        "answer": scene.answer,
        "probabilities": probabilities,
        "error": None if scene.error is None else str(scene.error),
        "milliseconds": 1e3 * sum(t.seconds for t in times) if times else None,
    }


# Which blocks are exact


def _again(scene: Scene) -> list[int]:
    """The boxes whose weights were counted before: those of a layer that is used twice."""
    names = [getattr(box.op, "weight", None) for box in scene.boxes]
    return [i for i, name in enumerate(names) if name is not None and name in names[:i]]


def _exact(
    scene: Scene, blocks: Sequence[Sequence[int]], layers: Sequence[str | int], budget: int
) -> set[int]:
    """The blocks whose numbers fit: those asked for, then the others in their order."""
    asked = [_block_named(scene, blocks, layer) for layer in layers]
    spent, chosen, held = 0, {0}, {0}
    for number in [*asked, *range(1, len(blocks))]:
        if number in chosen:
            continue
        needed = {i for box in blocks[number] for i in (box, *scene.boxes[box].inputs)} - held
        size = sum(4 * scene.boxes[i].output.numel() for i in needed)
        size += sum(4 * t.numel() for i in blocks[number] for t in _weights(scene, i))
        if spent + size <= budget:
            spent += size
            chosen.add(number)
            held |= needed
        elif number in asked:
            name = scene.boxes[blocks[number][0]].name
            raise InvalidProblem(
                f"layer {name!r} takes {size:,} bytes of exact numbers, {budget - spent:,} of the "
                f"budget of {budget:,} are left: raise --budget, or use --serve"
            )
    return chosen


def _block_named(scene: Scene, blocks: Sequence[Sequence[int]], layer: str | int) -> int:
    for number, block in enumerate(blocks):
        for box in (scene.boxes[i] for i in block):
            if layer == box.name or (box.layer is not None and str(layer) == str(box.layer.index)):
                return number
    names = ", ".join(dict.fromkeys(b.name for b in scene.boxes[1:]))
    raise InvalidProblem(f"no layer {layer!r}; there are: {names}")


def _weights(scene: Scene, index: int) -> list[Tensor]:
    op = scene.boxes[index].op
    return [scene.parameters[op.weight]] if isinstance(op, net.Convolution | net.Linear) else []


# Boxes


def _box(scene: Scene, index: int, shown: bool, exact: bool, with_weights: bool) -> dict[str, Any]:
    box = scene.boxes[index]
    values = map_of(box)
    largest = None if values is None else _largest(values)
    return {
        "name": box.name,
        "layer": None if box.layer is None else box.layer.index,
        "what": box.what,
        "inputs": box.inputs,
        "own": box.own,
        "shape": list(box.output.shape[1:]),
        "sight": asdict(box.sight) if isinstance(box.sight, Field) else box.sight.value,
        **_operation(scene, box, with_weights),
        "isMap": values is not None,
        "map": _map(values, largest, exact) if values is not None and largest and shown else None,
        "largest": largest,
        "dead": [] if values is None or index == 0 else _dead(values),
    }


def map_of(box: Box) -> NDArray[np.float32] | None:
    """The values of a box as (C, H, W) or, of vectors, (C, 1, 1); None if it is neither."""
    found = box.output
    if found.ndim == 2:
        found = found[:, :, None, None]
    if found.ndim != 4 or not found.is_floating_point() or not found.numel():
        return None
    return np.ascontiguousarray(found[0].detach().float().cpu().numpy())


def _map(values: NDArray[np.float32], largest: list[float], exact: bool) -> dict[str, Any]:
    if exact:
        return {"type": "float32", **_compressed(values)}
    scale = np.array([v or 1.0 for v in largest])[:, None, None]
    steps = np.rint(127 * np.nan_to_num(values, posinf=0, neginf=0) / scale)
    return {"type": "int8", **_compressed(np.clip(steps, -127, 127).astype(np.int8))}


def _compressed(values: NDArray[Any]) -> dict[str, str]:
    raw = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<")).tobytes()
    return {"data": base64.b64encode(zlib.compress(raw, 6)).decode("ascii")}


def _largest(values: NDArray[np.float32]) -> list[float]:
    """The largest absolute value of each channel, of those that are finite."""
    finite = np.where(np.isfinite(values), np.abs(values), 0)
    return [float(f"{v:.6g}") for v in finite.max(axis=(1, 2))]


def _dead(values: NDArray[np.float32]) -> list[int]:
    """The channels that are zero everywhere: they tell nothing of this picture."""
    if values.shape[1:] == (1, 1):
        return []
    return np.flatnonzero(~values.any(axis=(1, 2))).tolist()


def _operation(scene: Scene, box: Box, with_weights: bool) -> dict[str, Any]:
    """The kind of a box and the numbers of its kind."""
    given = scene.parameters
    match box.op:
        case net.Convolution(conv, weight, bias):
            kernel = given[weight]
            return {
                "kind": "conv",
                "groups": conv.groups,
                **_windows(conv, box),
                **_work(kernel, None if bias is None else given[bias], conv.multiply_adds),
                "dense": math.prod(conv.in_shape[1:] + conv.out_shape[1:]),
                "kernel": _kernel(kernel, with_weights),
                "bias": None if bias is None else _list(given[bias]),
            }
        case net.Linear(weight, bias):
            kernel = given[weight]
            return {
                "kind": "linear",
                **_work(kernel, None if bias is None else given[bias], kernel.numel()),
                "kernel": _kernel(kernel[:, :, None, None], with_weights),
                "bias": None if bias is None else _list(given[bias]),
            }
        case net.Pooling(pool):
            return {
                "kind": "pool",
                "mode": pool.kind,
                "countPadding": pool.count_include_pad,
                "divisor": pool.divisor_override,
                **_windows(pool, box),
            }
        case net.BatchNorm(net.Norm() | net.Constants() as norm):
            scale, shift = _affine(norm, given, box.output.shape[1])
            return {"kind": "norm", "scale": scale, "shift": shift}
        case net.Activation(act):
            formula = ACTIVATIONS[act.name].formula
            return {"kind": "act", "act": act.name, "slope": act.slope, "formula": formula}
        case net.Padding():
            return {"kind": "pad", **asdict(box.op)}
        case net.Arithmetic(kind):
            return {"kind": kind}
        case net.Concat():
            return {"kind": "cat"}
        case net.Flatten():
            return {"kind": "flatten"}
    return {"kind": "image" if box.name == "image" and not box.inputs else "plain"}


def _windows(problem: Conv | Pool, box: Box) -> dict[str, Any]:
    stage = Stage("", problem.in_shape[1:], problem.out_shape[1:], problem, box.sight)
    rows, cols = stage.unused()
    return {
        "rows": _window(problem.rows),
        "cols": _window(problem.cols),
        "formulas": stage.formulas(),
        "unused": {"rows": rows, "cols": cols},
    }


def _window(window: Window) -> dict[str, Any]:
    return {key: value for key, value in asdict(window).items() if key != "base_dilation"}


def _work(kernel: Tensor, bias: Tensor | None, multiply_adds: int) -> dict[str, int]:
    biases = 0 if bias is None else bias.numel()
    return {"weights": kernel.numel(), "biases": biases, "multiplyAdds": multiply_adds}


def _kernel(kernel: Tensor, exact: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"shape": list(kernel.shape)}
    return {**found, **_compressed(kernel.float().cpu().numpy())} if exact else found


def _list(values: Tensor) -> list[float | str]:
    """Numbers for JSON, which has no NaN and no infinities: those as words."""
    return [v if math.isfinite(v) else str(v) for v in values.double().tolist()]


def _affine(
    norm: net.Norm | net.Constants, given: Mapping[str, Tensor], channels: int
) -> tuple[list[float | str], list[float | str]]:
    """Scale and shift of each channel, in double precision."""
    if isinstance(norm, net.Constants):
        return [norm.scale] * channels, [norm.shift] * channels
    scale = 1 / torch.sqrt(given[norm.var].double() + norm.eps)
    if norm.weight is not None:
        scale = scale * given[norm.weight].double()
    shift = -given[norm.mean].double() * scale
    if norm.bias is not None:
        shift = shift + given[norm.bias].double()
    return _list(scale), _list(shift)


# What the network says, and how long it takes


def _probabilities(scene: Scene) -> list[float] | None:
    """Of the classes, if the network returns a vector: its softmax, unless it is one already."""
    last = None if scene.answer is None else scene.boxes[scene.answer].output
    if scene.error is not None or last is None or last.ndim != 2 or not scene.answer:
        return None
    values = last[0].double()
    if not bool(values.isfinite().all()):
        return None
    if bool((values >= 0).all()) and abs(float(values.sum()) - 1) < 1e-3:
        return values.tolist()
    return torch.softmax(values, 0).tolist()


def _fitting(names: Sequence[str] | None, found: Sequence[float] | None) -> list[str] | None:
    return list(names) if names and found and len(names) == len(found) else None


def _time(scene: Scene, block: Sequence[int], timed: Mapping[str, LayerTime]) -> dict[str, Any]:
    for op in (scene.boxes[i].op for i in block):
        if isinstance(op, net.Convolution | net.Linear) and op.weight in timed:
            row = timed[op.weight]
            share = row.share if math.isfinite(row.share) else 0.0
            return {
                "plan": row.layer,
                "kernels": row.kernels,
                "microseconds": 1e6 * row.seconds,
                "share": share,
            }
    return {"plan": None}
