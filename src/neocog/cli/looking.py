"""The commands that look into a network: ``summary`` and ``explain``."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.text import Text
from torch import Tensor, nn

from .. import data, models
from ..checkpoint import LoadedModel, Preprocessing, load_model
from ..errors import InvalidData, InvalidProblem
from ..factories import is_factory
from ..images import read_picture
from ..layers import LayerInfo, describe, size_text
from ..problem import Conv
from ..sight import Field, Sight
from ..tracing import ConvTrace, Explanation, PoolTrace, explain_value
from .explain_view import explain_view
from .summary_view import summary_view

Shape = tuple[int, int, int]

_SHORTHAND = re.compile(r"[0-9]*[A-Z]?[0-9]+(p[0-9]+)?(-[0-9]*[A-Z]?[0-9]+(p[0-9]+)?)*")
_MODEL = typer.Argument(
    metavar="MODEL",
    help="A run directory, a checkpoint, package.module:factory or a shorthand as 32C3-P2-10.",
    show_default=False,
)
_WEIGHTS = typer.Option("--weights", metavar="FILE", help="Weights for package.module:factory.")
_INPUT = typer.Option(
    "--input",
    metavar="C,H,W",
    help="Channels, height and width of the input, where MODEL has none.",
)
_JSON = typer.Option("--json", help="Print JSON instead.")

ModelArgument = Annotated[str, _MODEL]
WeightsOption = Annotated[Path | None, _WEIGHTS]
InputOption = Annotated[str | None, _INPUT]
JsonOption = Annotated[bool, _JSON]


def register(app: typer.Typer) -> None:
    """Adds both commands to the command line."""
    app.command()(summary)
    app.command()(explain)


def summary(
    model: ModelArgument,
    weights: WeightsOption = None,
    input: InputOption = None,
    as_json: JsonOption = False,
) -> None:
    """List a network layer by layer: sizes, weights, work and receptive fields.

    For each convolution and pool the size formula with its numbers, and the weights beside those
    of a fully connected layer between the same shapes.
    """
    loaded, in_shape = _open(model, weights, input)
    layers = describe(loaded.model, in_shape)
    parameters = models.weight_count(loaded.model)
    if as_json:
        _print_json(_summary_json(model, in_shape, layers, parameters))
        return
    console = Console(highlight=False)
    console.print(Text.assemble((loaded.source, "bold"), f" on an input of {size_text(in_shape)}"))
    console.print()
    console.print(summary_view(layers, in_shape, parameters))


def explain(
    model: ModelArgument,
    image: Annotated[
        str,
        typer.Argument(
            metavar="IMAGE",
            help="A picture file, or test:N for a picture of the digits' test part.",
        ),
    ],
    layer: Annotated[
        str, typer.Option("--layer", metavar="L", help="Its number in `summary`, or its name.")
    ],
    channel: Annotated[
        int, typer.Option("--channel", metavar="C", help="The output channel, from 0.")
    ],
    at: Annotated[
        str, typer.Option("--at", metavar="Y,X", help="Row and column of its output, from 0.")
    ],
    weights: WeightsOption = None,
    input: InputOption = None,
    show_all: Annotated[
        bool, typer.Option("--all", help="Draw every input channel, not only the largest few.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show where one number of a network comes from, and check it against the network.

    The window with its padding, the kernel, every product, the sum of each input channel, bias,
    activation and the pool's winner. Exit code 1 if that does not lead to the network's own value.
    """
    row, col = _numbers("--at", at, "Y,X", 2)
    loaded, in_shape = _open(model, weights, input)
    x, notes = _picture(image, in_shape, loaded.preprocessing)
    wanted = int(layer) if layer.isdecimal() else layer
    found = explain_value(loaded.model, x, wanted, channel, (row, col))
    if as_json:
        _print_json(_explanation_json(model, image, notes, found))
    else:
        console = Console(highlight=False)
        for note in notes:
            console.print(Text(f"{image}: {note}", style="dim"))
        console.print(explain_view(found, console.width, show_all))
    if not found.matches:
        typer.echo(
            f"the explanation gives {found.explained:.9g} but the network {found.network:.9g}: "
            f"they differ by {found.difference:.1e}, at most {found.allowed:.1e} is rounding",
            err=True,
        )
        raise typer.Exit(1)


# Arguments


def _open(spec: str, weights: Path | None, size: str | None) -> tuple[LoadedModel, Shape]:
    """The model and the shape of the input it is to be run on."""
    given: Shape | None = None
    if size is not None:
        channels, height, width = _numbers("--input", size, "C,H,W", 3)
        given = channels, height, width
        if min(given) < 1:
            raise InvalidProblem(f"--input {size}: expected C,H,W of at least 1 each")
    plain = weights is None and not Path(spec).exists() and not is_factory(spec)
    if plain and _SHORTHAND.fullmatch(spec):
        return _from_shorthand(spec, given or (1, 28, 28))
    loaded = load_model(spec, weights)
    in_shape = given or loaded.in_shape
    if in_shape is None:
        raise InvalidProblem(f"{spec} does not say what it takes; {_input_hint(loaded.model)}")
    return loaded, in_shape


def _from_shorthand(spec: str, in_shape: Shape) -> tuple[LoadedModel, Shape]:
    torch.manual_seed(0)  # untrained, but the same numbers every time
    model = models.parse(spec, in_shape, headless=True).eval()
    raw = Preprocessing(mean=(0.0,) * in_shape[0], std=(1.0,) * in_shape[0])
    return LoadedModel(model, in_shape, raw, (), f"{spec} (untrained)", spec), in_shape


def _input_hint(model: nn.Module) -> str:
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None:
        return "expected --input C,H,W"
    example = f"{first.in_channels},224,224"
    return (
        f"expected --input C,H,W (its first convolution takes {first.in_channels} channels: "
        f"--input {example})"
    )


def _numbers(option: str, text: str, form: str, count: int) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != count:
        raise InvalidProblem(f"{option} {text!r}: expected {form}, {count} whole numbers")
    return numbers


def _picture(image: str, in_shape: Shape, how: Preprocessing) -> tuple[Tensor, tuple[str, ...]]:
    """The picture as the model takes it, float32 (C, H, W), and what was done to it."""
    number = re.fullmatch(r"test:(-?[0-9]+)", image)
    if number is None:
        channels, *size = in_shape
        prepared = read_picture(
            image,
            channels,
            (size[0], size[1]),
            background=how.background,
            digit_like=how.digit_like,
        )
        return how.apply(prepared.tensor[None])[0], prepared.notes
    pictures = data.load().test.images
    index = int(number.group(1))
    if not 0 <= index < len(pictures):
        raise InvalidData(f"{image}: expected test:0 to test:{len(pictures) - 1}")
    shape = tuple(pictures.shape[1:])
    if shape != in_shape:
        raise InvalidData(
            f"{image} is a digit of {size_text(shape)}, the network takes {size_text(in_shape)}"
        )
    return how.apply(pictures[index : index + 1])[0], ()


# JSON


def _summary_json(
    model: str, in_shape: Shape, layers: Sequence[LayerInfo], parameters: int
) -> dict[str, Any]:
    return {
        "model": model,
        "input": in_shape,
        "layers": [_layer_json(info) for info in layers],
        "weights": sum(info.weights for info in layers),
        "biases": sum(info.biases for info in layers),
        "multiply_adds": sum(info.multiply_adds or 0 for info in layers),
        "parameters": parameters,
    }


def _layer_json(info: LayerInfo) -> dict[str, Any]:
    plain = {key: value for key, value in vars(info).items() if key != "stages"}
    stages = []
    for stage in info.stages:
        rows, cols = stage.unused()
        formulas = stage.formulas()
        stages.append(
            {
                "what": stage.what,
                "in_shape": stage.in_shape,
                "out_shape": stage.out_shape,
                "height": formulas[0] if formulas else None,
                "width": formulas[-1] if formulas else None,
                "unused_rows": rows,
                "unused_columns": cols,
                "kernel": stage.problem.weight_shape if isinstance(stage.problem, Conv) else None,
                "sees": _sight_json(stage.sight),
            }
        )
    return {**plain, "what": info.what, "stages": stages}


def _sight_json(sight: Sight) -> Any:
    return asdict(sight) if isinstance(sight, Field) else sight.value


def _explanation_json(
    model: str, image: str, notes: Sequence[str], found: Explanation
) -> dict[str, Any]:
    info = found.layer
    return {
        "model": model,
        "image": image,
        "notes": notes,
        "layer": {"index": info.index, "name": info.name, "what": info.what},
        "out_shape": info.out_shape,
        "channel": found.channel,
        "at": found.at,
        "sees": None if found.seen is None else {"rows": found.seen[0], "columns": found.seen[1]},
        "convolution": None if found.conv is None else _conv_json(found.conv),
        "pool": None if found.pool is None else _pool_json(found.pool),
        "explained": found.explained,
        "network": found.network,
        "difference": found.difference,
        "allowed": found.allowed,
        "matches": found.matches,
    }


def _conv_json(conv: ConvTrace) -> dict[str, Any]:
    arrays = zip(conv.channels, conv.window, conv.kernel, conv.products, conv.sums, strict=True)
    names = ("channel", "window", "kernel", "products", "sum")
    return {
        "at": conv.at,
        "rows": conv.taps.rows,
        "columns": conv.taps.cols,
        "inside": conv.taps.inside,
        "input_channels": [dict(zip(names, each, strict=True)) for each in arrays],
        "bias": conv.bias,
        "residual": conv.residual,
        "pre_activation": conv.pre_activation,
        "activation": str(conv.activation),
        "activated": conv.activated,
    }


def _pool_json(pool: PoolTrace) -> dict[str, Any]:
    return {
        "kind": pool.problem.kind,
        "rows": pool.taps.rows,
        "columns": pool.taps.cols,
        "inside": pool.taps.inside,
        "values": pool.values,
        "winner": pool.winner,
        "winner_at": None if pool.winner is None else pool.position(pool.winner),
        "divisor": pool.divisor,
        "result": pool.result,
    }


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(_plain(value), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    """Lists for arrays and tuples; NaN and infinities, which JSON has not, as words."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else str(float(value))
    return value
