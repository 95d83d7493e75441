"""What ``summary`` and ``explain`` print with ``--json``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ..given_inputs import InputSpec
from ..layers import LayerInfo, Walked
from ..problem import Conv
from ..sight import Field, Sight
from ..tracing import ConvTrace, Explanation, PoolTrace


def summary_json(
    model: str, inputs: Sequence[InputSpec], walked: Walked, parameters: int
) -> dict[str, Any]:
    """What ``neocog summary --json`` prints; ``input`` is the shape of the first of ``inputs``."""
    layers, held = walked.layers, walked.held
    return {
        "model": model,
        "input": inputs[0].shape,
        "inputs": [
            {
                "name": x.name,
                "shape": x.shape,
                "dtype": x.dtype and str(x.dtype).removeprefix("torch."),
            }
            for x in inputs
        ],
        "layers": [_layer_json(info) for info in layers],
        "held": [asdict(part) for part in held],
        "weights": sum(i.weights for i in layers) + sum(p.count for p in held if not p.is_bias),
        "biases": sum(i.biases for i in layers) + sum(p.count for p in held if p.is_bias),
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
    if not isinstance(sight, Field):
        return sight.value
    axes = asdict(sight)
    return {
        name: {key: value for key, value in axis.items() if value is not None}
        for name, axis in axes.items()
    }


def explanation_json(model: str, image: str, notes: Sequence[str], found: Explanation) -> Any:
    """What ``neocog explain --json`` prints; NaN and infinities, which JSON has not, as words."""
    info = found.layer
    value = {
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
    return _plain(value)


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


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else str(float(value))
    return value
