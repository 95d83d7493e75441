"""The command ``export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..foreign import shown
from .given import InputOption, ModelArgument, check_out, open_model
from .reading import WeightsOption
from .shared import ForceOption, JsonOption, check_new, print_json, say

if TYPE_CHECKING:
    from ..exporting import Exported, Port


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command()(export)


def export(
    model: ModelArgument,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="Ends in .onnx (ONNX) or .pt2 (torch.export).",
            show_default="<MODEL>.onnx, <MODEL>-raw.onnx with --raw",
        ),
    ] = None,
    force: ForceOption = False,
    raw: Annotated[
        bool,
        typer.Option(
            "--raw", help="Let it take pixels, 0 to 255 as uint8, and do the scaling itself."
        ),
    ] = False,
    opset: Annotated[
        int | None,
        typer.Option("--opset", metavar="N", help="Of ONNX.", show_default="torch.onnx's choice"),
    ] = None,
    weights: WeightsOption = None,
    input: InputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a network as a file for other programs: ONNX, or torch.export's format.

    It takes any number of pictures at once, and says in its metadata, under the key neocog, how
    pixels become its input and what its classes are called. Before it is written it is run, in
    ONNX Runtime or loaded back, and has to give the network's answers. A file that is there
    already stays as it is, unless --force is given.
    """
    path = out or Path(f"{_name(model)}{'-raw' if raw else ''}.onnx")
    check_out(path, [model, weights])
    from .. import exporting

    exporting.check_request(path, opset)
    check_new(path, force)
    given = open_model(model, weights, input)
    if given.error is not None:
        raise given.error
    loaded = given.loaded
    exported = exporting.export(
        loaded.model,
        path,
        given.in_shape,
        classes=loaded.classes,
        preprocessing=loaded.preprocessing,
        raw=raw,
        opset=opset,
    )
    if as_json:
        print_json({"model": loaded.source, **exported.to_dict()})
    else:
        _say(exported)


def _name(model: str) -> str:
    """What a file made of a MODEL is called: as its folder or file, or as the factory."""
    path = Path(model)
    if path.is_dir():
        return path.resolve().name
    return path.stem if path.exists() else model.rpartition(":")[2]


def _say(exported: Exported) -> None:
    """What was written, what it takes and gives, and how good it is."""
    from ..exporting import CHECKED

    version = "" if exported.opset is None else f", opset {exported.opset}"
    say(f"{shown(exported.path)}  ({exported.format}{version}, {exported.bytes:,} bytes)")
    say(f"takes {', '.join(map(_port, exported.inputs))}: {exported.values}")
    say(f"gives {', '.join(map(_port, exported.outputs))}")
    batches = " and ".join(map(str, CHECKED))
    say(
        f"checked in {exported.checked_in} with batches of {batches}: "
        f"off by at most {exported.error:.1e} of the largest answer"
    )


def _port(port: Port) -> str:
    return f"{port.name} {port.dtype} [{', '.join(map(str, port.shape))}]"
