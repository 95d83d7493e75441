"""The definition of every problem: plain NumPy loops in float64, what the kernels must agree with.

**What a convolution is.** A grey picture of 3x3 pixels shall become 2x2 numbers. A fully connected
layer would tie each of the 4 numbers to all 9 pixels by a weight of its own: 36 weights. A
convolution has one small kernel of weights, here 2x2, and lays it on the picture at every place
where it fits. At each place, every weight is multiplied with the pixel beneath it and the products
are summed; that sum is the output at that place. So 4 weights do, each output looks at a
neighbourhood only, and a pattern is found by the same weights wherever it appears: shift the
picture, and the output shifts with it.

**Its parameters.** The stride is how far the kernel moves from one output to the next. Padding is a
frame of zeros around the picture, so that the kernel may hang over the border: one pixel of it
keeps the size of the picture under a 3x3 kernel, two under 5x5. Dilation spreads the weights apart.
Which weight meets which pixel is all in :meth:`neocog.geometry.Window.taps`; zeros add nothing to a
sum, so the pairs on the padding are simply left out there.

**Channels.** A picture has several numbers per pixel (red, green, blue), and so has the result of a
convolution. A kernel therefore has as many channels as its input and sums over all of them; as many
kernels as output channels stand side by side. With ``groups`` the channels are cut into equal runs,
and the kernels of one run see the inputs of the same run only.

Arrays are laid out as in PyTorch: pictures (N, C, H, W), weights (K, C/groups, KH, KW). Results are
float64. Shapes that differ from the problem's raise InvalidProblem.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .activations import ACTIVATIONS
from .errors import InvalidProblem
from .geometry import Window
from .problem import Act, Add, Affine, Bias, Block, Conv, Pool, Shape
from .reductions import REDUCTIONS

Array = NDArray[np.float64]
Winners = NDArray[np.int64]


def convolution(problem: Conv, x: ArrayLike, w: ArrayLike, bias: ArrayLike | None = None) -> Array:
    """The sum of weight times input over all taps and channels, at every place. (N, K, OH, OW).

    ``x`` (N, C, H, W); ``w`` (K, C/groups, KH, KW); ``bias`` (K,), added to its output channel.
    """
    x = _by_group(_array("x", x, problem.in_shape), problem.groups, axis=1)
    w = _by_group(_array("w", w, problem.weight_shape), problem.groups, axis=0)
    out = np.zeros(problem.out_shape)
    by_group = _by_group(out, problem.groups, axis=1)
    for oh, kh, ih in _taps(problem.rows, problem.height):
        for ow, kw, iw in _taps(problem.cols, problem.width):
            # For each picture n and group g: every kernel k, summed over the input channels c.
            products = np.einsum("ngc,gkc->ngk", x[..., ih, iw], w[..., kh, kw])
            by_group[..., oh, ow] += products
    return out if bias is None else out + _per_channel("bias", bias, problem.out_channels)


def convolution_grad_input(problem: Conv, g: ArrayLike, w: ArrayLike) -> Array:
    """How a loss changes with the input, given ``g`` (N, K, OH, OW), how it does with the output.

    An input takes part in an output through the products ``weight*input``. Whatever the output's
    change by one does to the loss, the input's change by one does ``weight`` times. (N, C, H, W).
    """
    g = _by_group(_array("g", g, problem.out_shape), problem.groups, axis=1)
    w = _by_group(_array("w", w, problem.weight_shape), problem.groups, axis=0)
    grad = np.zeros(problem.in_shape)
    by_group = _by_group(grad, problem.groups, axis=1)
    for oh, kh, ih in _taps(problem.rows, problem.height):
        for ow, kw, iw in _taps(problem.cols, problem.width):
            products = np.einsum("ngk,gkc->ngc", g[..., oh, ow], w[..., kh, kw])
            by_group[..., ih, iw] += products
    return grad


def convolution_grad_weight(problem: Conv, g: ArrayLike, x: ArrayLike) -> Array:
    """How a loss changes with the weights, given ``g`` (N, K, OH, OW), how it does with the output.

    The same products, seen from the weight: it counts ``input`` times, summed over all the places
    where the kernel was laid and all pictures of the batch. (K, C/groups, KH, KW).
    """
    g = _by_group(_array("g", g, problem.out_shape), problem.groups, axis=1)
    x = _by_group(_array("x", x, problem.in_shape), problem.groups, axis=1)
    grad = np.zeros(problem.weight_shape)
    by_group = _by_group(grad, problem.groups, axis=0)
    for oh, kh, ih in _taps(problem.rows, problem.height):
        for ow, kw, iw in _taps(problem.cols, problem.width):
            products = np.einsum("ngk,ngc->gkc", g[..., oh, ow], x[..., ih, iw])
            by_group[..., kh, kw] += products
    return grad


def pool(problem: Pool, x: ArrayLike) -> tuple[Array, Winners | None]:
    """Each window of each channel reduced to one number: its maximum or its mean. No weights.

    Padding never takes part in a maximum; for a mean it counts as zeros unless
    ``count_include_pad`` is off. Also returned, for a maximum: the winners, the tap ``kh*KW + kw``
    of each window that gave the result, -1 if the window covers padding only (its maximum is
    -inf). Of equal taps the first wins, of NaN the last. ``x`` (N, C, H, W) to (N, C, OH, OW).
    """
    x = _array("x", x, problem.in_shape)
    row = REDUCTIONS[problem.kind]
    out = np.empty(problem.out_shape)
    winners = np.full(problem.out_shape, -1, dtype=np.int64)
    for oh, ow in np.ndindex(*problem.out_shape[2:]):
        total = np.full(x.shape[:2], row.init)
        winner = winners[..., oh, ow]
        for tap, ih, iw in _window(problem, oh, ow):
            value = x[..., ih, iw]
            if row.improves is not None:
                # The first tap wins even where nothing is greater than the start, -inf.
                winner[row.improves(total, value) | (winner == -1)] = tap
            total = row.combine(total, value)
        out[..., oh, ow] = row.finish(total, divisor(problem, oh, ow))
    return out, (winners if row.selects else None)


def divisor(problem: Pool, oh: int, ow: int) -> int:
    """What the sum over the window of output ``(oh, ow)`` is divided by to give the mean."""
    if problem.divisor_override is not None:
        return problem.divisor_override
    taps = Window.padded_taps if problem.count_include_pad else Window.taps
    return len(taps(problem.rows, oh, problem.height)) * len(taps(problem.cols, ow, problem.width))


def pool_grad(problem: Pool, g: ArrayLike, winners: Winners | None = None) -> Array:
    """How a loss changes with the input, given ``g`` (N, C, OH, OW), how it does with the output.

    A mean hands it in equal shares to every input of its window, a maximum to its winner alone
    (``winners`` as :func:`pool` returned them). (N, C, H, W).
    """
    g = _array("g", g, problem.out_shape)
    row = REDUCTIONS[problem.kind]
    if row.selects and winners is None:
        raise InvalidProblem(f"the gradient of {problem} needs the winners of its windows")
    grad = np.zeros(problem.in_shape)
    for oh, ow in np.ndindex(*problem.out_shape[2:]):
        given = g[..., oh, ow]
        for tap, ih, iw in _window(problem, oh, ow):
            if winners is not None and row.selects:
                grad[..., ih, iw] += np.where(winners[..., oh, ow] == tap, given, 0)
            else:
                grad[..., ih, iw] += given / divisor(problem, oh, ow)
    return grad


@dataclass(frozen=True)
class BlockResult:
    """What a block computes, and what its gradient needs of it.

    ``out`` (N, K, OH, OW); ``before_pool`` (N, K, CH, CW), the same as ``out`` without a pool;
    ``entering``, the value that each step of the epilogue was given; ``winners`` of a maximum.
    """

    out: Array
    before_pool: Array
    entering: tuple[Array, ...]
    winners: Winners | None


def block(
    problem: Block,
    x: ArrayLike,
    w: ArrayLike,
    bias: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    shift: ArrayLike | None = None,
    residual: ArrayLike | None = None,
) -> BlockResult:
    """The convolution, then the steps of the epilogue one after the other.

    ``bias``, ``scale`` and ``shift`` (K,) and ``residual`` (N, K, CH, CW) are needed by the steps
    Bias, Affine and Add, and not looked at without them.
    """
    channels = problem.conv.out_channels
    value = before_pool = convolution(problem.conv, x, w)
    entering = []
    winners = None
    for step in problem.epilogue:
        entering.append(value)
        if isinstance(step, Bias):
            value = value + _per_channel("bias", bias, channels)
        elif isinstance(step, Affine):
            value = value * _per_channel("scale", scale, channels)
            value = value + _per_channel("shift", shift, channels)
        elif isinstance(step, Add):
            value = value + _array("residual", residual, problem.conv_shape)
        elif isinstance(step, Act):
            value = ACTIVATIONS[step.name].forward(value, step.slope)
        else:
            assert problem.pool is not None
            value, winners = pool(problem.pool, value)
            continue
        before_pool = value
    return BlockResult(value, before_pool, tuple(entering), winners)


def block_grad(
    problem: Block,
    g: ArrayLike,
    x: ArrayLike,
    w: ArrayLike,
    bias: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    shift: ArrayLike | None = None,
    residual: ArrayLike | None = None,
) -> dict[str, Array]:
    """How a loss changes with everything that went into a block, given ``g`` (N, K, OH, OW).

    The steps are undone from the last to the first, each turning the gradient of its result into
    the gradient of what it was given (the chain rule). The keys are ``x``, ``w`` and those of
    ``bias``, ``scale``, ``shift``, ``residual`` that the epilogue has a step for.
    """
    result = block(problem, x, w, bias, scale, shift, residual)
    g = _array("g", g, problem.out_shape)
    grads: dict[str, Array] = {}
    for step, value in zip(reversed(problem.epilogue), reversed(result.entering), strict=True):
        if isinstance(step, Bias):
            grads["bias"] = g.sum(axis=(0, 2, 3))
        elif isinstance(step, Affine):
            grads["scale"] = (g * value).sum(axis=(0, 2, 3))
            grads["shift"] = g.sum(axis=(0, 2, 3))
            g = g * _per_channel("scale", scale, problem.conv.out_channels)
        elif isinstance(step, Add):
            grads["residual"] = g
        elif isinstance(step, Act):
            g = g * ACTIVATIONS[step.name].derivative(value, step.slope)
        else:
            assert problem.pool is not None
            g = pool_grad(problem.pool, g, result.winners)
    grads["x"] = convolution_grad_input(problem.conv, g, w)
    grads["w"] = convolution_grad_weight(problem.conv, g, x)
    return grads


def _taps(window: Window, n: int) -> Iterator[tuple[int, int, int]]:
    """(output, kernel element, input) for every product along one axis."""
    for o in range(window.out_size(n)):
        for k, i in window.taps(o, n):
            yield o, k, i


def _window(problem: Pool, oh: int, ow: int) -> Iterator[tuple[int, int, int]]:
    """(tap kh*KW + kw, input row, input column) for every input under one window of a pool."""
    for kh, ih in problem.rows.taps(oh, problem.height):
        for kw, iw in problem.cols.taps(ow, problem.width):
            yield kh * problem.cols.size + kw, ih, iw


def _by_group(array: Array, groups: int, axis: int) -> Array:
    """The same memory with an axis of channels seen as (group, channel within it)."""
    shape = array.shape
    return array.reshape(*shape[:axis], groups, shape[axis] // groups, *shape[axis + 1 :])


def _per_channel(name: str, value: ArrayLike | None, channels: int) -> Array:
    """Shaped to be combined with (N, K, OH, OW)."""
    return _array(name, value, (channels,)).reshape(1, channels, 1, 1)


def _array(name: str, value: ArrayLike | None, shape: Shape) -> Array:
    if value is None:
        raise InvalidProblem(f"{name} is missing: expected shape {shape}")
    array = np.ascontiguousarray(value, dtype=np.float64)
    if array.shape != shape:
        raise InvalidProblem(f"{name} must have shape {shape}, got {array.shape}")
    return array
