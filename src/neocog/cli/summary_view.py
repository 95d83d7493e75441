"""How ``neocog summary`` looks: a table of layers, one of size formulas and one of weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..foreign import shown
from ..given_inputs import InputSpec
from ..layers import LayerInfo, Stage, Walked, size_text
from ..ownership import Held
from ..problem import Conv, Pool
from ..sight import Beyond, Field
from .shared import plain_table

_LISTED = 4  # indices of unreached rows or columns before the rest is only counted


def summary_view(
    walked: Walked, inputs: Sequence[InputSpec], all_parameters: int | None
) -> RenderableType:
    """Everything ``neocog summary`` prints below its headline.

    ``all_parameters`` counts the model's own, those outside of the listed layers included; None
    for a list that stops short.
    """
    layers, held = walked.layers, walked.held
    parts: list[RenderableType] = [_layers(layers, inputs), *_notes(_layer_notes(layers))]
    if any(stage.problem for info in layers for stage in info.stages):
        parts += [_sizes(layers), *_notes(_SIZE_NOTES)]
    parts += [_weights(layers, held), *_notes(_weight_notes(layers, held, all_parameters))]
    return Group(*parts)


def _layers(layers: Sequence[LayerInfo], inputs: Sequence[InputSpec]) -> Table:
    table = _table("layers")
    table.add_column("#", justify="right", style="cyan")
    table.add_column("name", overflow="fold")
    table.add_column("what it does")
    table.add_column("output", justify="right", no_wrap=True, style="bold")
    table.add_column("sees", justify="right", no_wrap=True)
    table.add_column("jump", justify="right", no_wrap=True)
    for given in inputs:
        name = "the input" if given.name is None else f"the input {given.name}"
        table.add_row("", "", Text(name, style="dim"), Text(size_text(given.shape), style="dim"))
    for info in layers:
        for place, stage in enumerate(info.stages):
            index, name = (str(info.index), shown(info.name)) if place == 0 else ("", "")
            what = shown(stage.what) if place == 0 else f"+ {stage.what}"
            output = size_text(stage.out_shape)
            table.add_row(index, Text(name), Text(what), output, *_sight_cells(stage))
    return table


def _sight_cells(stage: Stage) -> tuple[str, str]:
    sight = stage.sight
    if isinstance(sight, Field):
        rows, cols = sight.rows, sight.cols
        jump = f"{rows.jump}" if rows.jump == cols.jump else f"{rows.jump}x{cols.jump}"
        return f"{rows.size}x{cols.size}{' *' if sight.round else ''}", jump
    return {Beyond.ALL: ("all", ""), Beyond.FLAT: ("", ""), Beyond.UNKNOWN: ("?", "?")}[sight]


def _layer_notes(layers: Sequence[LayerInfo]) -> list[str]:
    notes = ["sees: the window of the input behind one output; jump: on to the next one's"]
    if any(isinstance(s.sight, Field) and s.sight.round for info in layers for s in info.stages):
        notes.append("*: padded in a circle: outputs at one edge see the opposite edge too")
    if any(stage.sight is Beyond.UNKNOWN for info in layers for stage in info.stages):
        notes.append("?: cannot be told from what happens between the input and this layer")
    return notes


_SIZE_NOTES = ["I input size, D dilation, K kernel size, S stride, low and high padding"]


def _sizes(layers: Sequence[LayerInfo]) -> Table:
    table = _table("output sizes")
    table.add_column("#", justify="right", style="cyan")
    table.add_column("")
    table.add_column("floor((I - D*(K-1) - 1 + low + high)/S) + 1")
    for info in layers:
        for stage in info.stages:
            for axis, line in size_lines(stage):
                table.add_row(str(info.index), axis, Text(line))
    return table


def size_lines(stage: Stage) -> list[tuple[str, str]]:
    """The formulas of a stage with their numbers by axis, and what no window reaches."""
    formulas, name = stage.formulas(), stage.what.split(",")[0]
    lines = [(name, formulas[0])] if len(formulas) == 1 else []
    if len(formulas) == 2:
        lines = [(f"{name}, height", formulas[0]), (f"{name}, width", formulas[1])]
    missed = [
        _indices(axis, indices)
        for axis, indices in zip(("row", "column"), stage.unused(), strict=True)
        if indices
    ]
    return [*lines, ("", f"no window reaches {' and '.join(missed)}")] if missed else lines


def _indices(axis: str, indices: tuple[int, ...]) -> str:
    shown = ", ".join(str(index) for index in indices[:_LISTED])
    more = f" and {len(indices) - _LISTED} more" if len(indices) > _LISTED else ""
    return f"{axis}{_plural(len(indices))} {shown}{more}"


def _weights(layers: Sequence[LayerInfo], held: Sequence[Held]) -> Table:
    table = _table("weights")
    table.add_column("#", justify="right", style="cyan")
    table.add_column("weights")
    table.add_column("biases", justify="right", no_wrap=True)
    beside = "if fully connected:\nweights + biases" if _convolves(layers) else ""
    table.add_column(beside, justify="right")
    table.add_column("multiply-\nadds", justify="right", no_wrap=True)
    for info in layers:
        for stage in info.stages:
            table.add_row(str(info.index), *_weight_cells(info, stage))
    weights, biases = sum(info.weights for info in layers), sum(info.biases for info in layers)
    for part in held:
        is_bias = part.is_bias
        weights, biases = weights + part.count * (not is_bias), biases + part.count * is_bias
        name = f"{shown(part.name)}, {size_text(part.shape) or 'a number'}"
        table.add_row(
            "", *((name, f"{part.count:,}") if is_bias else (f"{name} = {part.count:,}",))
        )
    table.add_section()
    work = sum(info.multiply_adds or 0 for info in layers)
    table.add_row("", f"{weights:,} in all", f"{biases:,}", "", f"{work:,}", style="bold")
    return table


def _convolves(layers: Sequence[LayerInfo]) -> bool:
    return any(isinstance(info.stages[0].problem, Conv) for info in layers)


def _weight_cells(info: LayerInfo, stage: Stage) -> tuple[str | Text, str, str, str]:
    problem = stage.problem
    if isinstance(problem, Pool):
        kept = f"no weights, {problem.channels} channel{_plural(problem.channels)} kept"
        return Text(kept, style="dim"), "", "", ""
    work = "?" if info.multiply_adds is None else f"{info.multiply_adds:,}"
    if info.shared_with is not None:
        more = f" and {info.weights:,} more" if info.weights else ""
        biases = f"{info.biases:,}" if info.biases else ""
        return Text(f"those of layer {info.shared_with}{more}", style="dim"), biases, "", work
    if isinstance(problem, Conv):
        kernels, *each = problem.weight_shape
        weights = f"{kernels} kernel{_plural(kernels)} of {size_text(each)}"
        if info.weights != math.prod(problem.weight_shape):
            weights += f", kept as {info.weights:,}"
        else:
            weights += f" = {info.weights:,}"
        dense = f"{info.dense_weights:,} + {info.dense_biases:,}"
        return weights, f"{info.biases:,}", dense, work
    if info.weights == info.biases == 0:
        return Text("none", style="dim"), "", "", "" if work == "0" else work
    if info.features is not None:
        inputs, outputs = info.features
        equals = "=" if info.weights == inputs * outputs else "kept as"
        return f"{inputs} x {outputs} {equals} {info.weights:,}", f"{info.biases:,}", "", work
    return f"{info.weights:,}", f"{info.biases:,}", "", work


def _weight_notes(
    layers: Sequence[LayerInfo], held: Sequence[Held], all_parameters: int | None
) -> list[str]:
    notes = []
    if _convolves(layers):
        notes.append("a kernel: input channels x height x width, one for each output channel")
        notes.append(
            "fully connected: every input to every output of the convolution, C*H*W*K*OH*OW"
        )
    if held:
        notes.append("without a number: what the network holds beside its layers, by name")
    listed = sum(info.weights + info.biases for info in layers) + sum(p.count for p in held)
    outside = 0 if all_parameters is None else all_parameters - listed
    if outside:
        notes.append(f"{outside:,} more parameters belong to no layer that this input passes")
    return notes


def _plural(count: int) -> str:
    return "" if count == 1 else "s"


def _notes(notes: Sequence[str]) -> list[RenderableType]:
    return [*(Padding(Text(note, style="dim"), (0, 0, 0, 1)) for note in notes), Text()]


def _table(title: str) -> Table:
    return plain_table(title, header_style="dim")
