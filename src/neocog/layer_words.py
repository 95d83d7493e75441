"""What a layer does, in words: ``conv 3x3, padding 1, relu``."""

from __future__ import annotations

from torch import nn

from . import nn as neocog_nn
from .activations import ACTIVATIONS
from .problem import Act, Conv, Pool


def activation_of(module: nn.Module) -> Act:
    """The activation a convolution applies itself; identity for one that is not fused."""
    if not isinstance(module, neocog_nn.ConvBlock):
        return Act("identity")
    takes_slope = ACTIVATIONS[module.activation].takes_slope
    return Act(module.activation, module.negative_slope if takes_slope else 0.0)


def words_of(module: nn.Module) -> str:
    """What a layer without windows does."""
    if isinstance(module, nn.Linear):
        return f"fully connected {module.in_features} -> {module.out_features}"
    plain = {
        nn.BatchNorm2d: "batch norm",
        nn.Flatten: "flatten",
        nn.ReLU: "relu",
        nn.Dropout: "dropout (only in training)",
        nn.Identity: "identity",
    }
    details = module.extra_repr()
    return plain.get(type(module)) or type(module).__name__ + (f"({details})" if details else "")


def conv_words(module: nn.Module, conv: Conv) -> str:
    """``conv 3x3, stride 2, padding 1, relu``."""
    words = [f"conv {conv.rows.size}x{conv.cols.size}", *_window_words(conv)]
    if conv.groups != 1:
        words.append(f"groups {conv.groups}")
    mode = getattr(module, "padding_mode", "zeros")
    if mode != "zeros":
        words.append(f"padded by {mode}")
    activation = activation_of(module)
    return ", ".join(words if activation.name == "identity" else [*words, str(activation)])


def pool_words(pool: Pool) -> str:
    """``average pool 3x3, stride 2, padding 1, padding not counted``."""
    kind = {"mean": "average"}.get(pool.kind, pool.kind)
    words = [f"{kind} pool {pool.rows.size}x{pool.cols.size}", *_window_words(pool)]
    words += ["ceil mode"] if pool.rows.ceil else []
    words += [] if pool.count_include_pad else ["padding not counted"]
    if pool.divisor_override is not None:
        words.append(f"divisor {pool.divisor_override}")
    return ", ".join(words)


def _window_words(problem: Conv | Pool) -> list[str]:
    rows, cols = problem.rows, problem.cols
    usual = (rows.size, cols.size) if isinstance(problem, Pool) else (1, 1)
    words = []
    if (rows.stride, cols.stride) != usual:
        words.append(f"stride {_both(rows.stride, cols.stride)}")
    if (rows.low, cols.low) != (rows.high, cols.high):
        words.append(
            f"padding top {rows.low}, bottom {rows.high}, left {cols.low}, right {cols.high}"
        )
    elif (rows.low, cols.low) != (0, 0):
        words.append(f"padding {_both(rows.low, cols.low)}")
    if (rows.dilation, cols.dilation) != (1, 1):
        words.append(f"dilation {_both(rows.dilation, cols.dilation)}")
    return words


def _both(rows: int, cols: int) -> str:
    return f"{rows}" if rows == cols else f"{rows}x{cols}"
