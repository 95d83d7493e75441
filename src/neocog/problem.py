"""What is to be computed: a convolution, a pool, or a block of both, with every size in it.

Problems are frozen, hashable and checked when they are built, here and nowhere else. ``str(p)``
is one line and ``parse(str(p)) == p``; the line is what tests, logs and benchmarks print:

    conv n1 c64x56x56 k64 3x3 s1x1 p1,1,1,1 | bias | relu | max 2x2 s2x2 p0,0,0,0
    max n8 c16x28x28 3x3 s2x2 p1,1,1,1 ceil

``n`` batch, ``c`` channels x height x width of the input, ``k`` output channels, then the kernel,
``s`` stride, ``p`` padding top,bottom,left,right, ``d`` dilation, ``b`` base dilation, ``g``
groups, ``ceil``, ``exclude_pad`` and ``div`` for pools. What is 1 or off may be left out, a pool's
stride is its kernel unless given, and one number stands for all: ``s2``, ``p1``. Steps of an
epilogue follow after bars; a block without any ends in a bar.

A 1-d layer is a 2-d one of height 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NoReturn

from .errors import InvalidProblem
from .geometry import Window, same_padding
from .reductions import REDUCTIONS
from .steps import (
    POOLING_COUNTS,
    POOLING_FLAGS,
    WINDOW_COUNTS,
    Act,
    Add,
    Affine,
    Bias,
    Pooling,
    Step,
    check_whole,
    check_window,
    pair,
    pooling,
    pooling_text,
    read_fields,
    read_pooling,
    read_step,
    read_windows,
    windows_text,
)

__all__ = [
    "Act",
    "Add",
    "Affine",
    "Bias",
    "Block",
    "Conv",
    "Pool",
    "Pooling",
    "Problem",
    "Shape",
    "Step",
    "check_shapes",
    "conv2d_problem",
    "parse",
    "pooling",
]

Shape = tuple[int, ...]
_STEPS = "each of Bias, Affine, Add, Act and, last, Pooling may stand once"


@dataclass(frozen=True)
class Conv:
    """A 2-d convolution (cross-correlation, as every framework has it) without its bias.

    Output channels and input channels are cut into ``groups`` equal runs; each run of outputs sees
    only its run of inputs. Input, output and weight shapes are PyTorch's. A batch of 0 is valid.
    InvalidProblem if the sizes fit no convolution.
    """

    batch: int
    in_channels: int
    height: int
    width: int
    out_channels: int
    rows: Window
    cols: Window
    groups: int = 1

    def __post_init__(self) -> None:
        _check_input(self, "in_channels")
        check_whole("out_channels", self.out_channels, 1)
        check_whole("groups", self.groups, 1)
        for axis, window, _ in _axes(self):
            check_window(axis, window)
            if window.ceil:
                raise InvalidProblem(f"{axis}: only pools have a ceil mode")
        for name in ("in_channels", "out_channels"):
            whole, rest = divmod(getattr(self, name), self.groups)
            if rest:
                _fail(
                    self,
                    f"groups={self.groups} must divide {name}={getattr(self, name)}: "
                    f"{getattr(self, name)} = {self.groups}*{whole} + {rest}",
                )
        for axis, window, n in _axes(self):
            _check_fits(self, axis, window, n)
        _check_addressable(self, self.in_shape, self.weight_shape, self.out_shape)

    @property
    def in_shape(self) -> Shape:
        """(N, C, H, W)."""
        return (self.batch, self.in_channels, self.height, self.width)

    @property
    def out_shape(self) -> Shape:
        """(N, K, OH, OW)."""
        return (self.batch, self.out_channels, *_out_sizes(self))

    @property
    def weight_shape(self) -> Shape:
        """(K, C/groups, KH, KW)."""
        return (
            self.out_channels,
            self.in_channels // self.groups,
            self.rows.size,
            self.cols.size,
        )

    @property
    def multiply_adds(self) -> int:
        """One for every tap of every output, those on padding included."""
        return math.prod(self.out_shape) * math.prod(self.weight_shape[1:])

    def grad_input(self) -> Conv:
        """The convolution of the output's gradient that gives the input's.

        Its weight, group by group, is this one's with input and output channels exchanged and the
        kernel turned by 180 degrees: ``w'[j*C/g + c, k, y, x] = w[j*K/g + k, c, KH-1-y, KW-1-x]``.
        """
        out_height, out_width = _out_sizes(self)
        return Conv(
            batch=self.batch,
            in_channels=self.out_channels,
            height=out_height,
            width=out_width,
            out_channels=self.in_channels,
            rows=self.rows.adjoint(self.height),
            cols=self.cols.adjoint(self.width),
            groups=self.groups,
        )

    def grad_weight(self) -> Conv:
        """The convolution of the input with the output's gradient that gives the weight's.

        Batch and channels change places, so do stride and dilation:
        its input is ``x'[c, j*N + n] = x[n, j*C/g + c]`` of shape (C/g, g*N, H, W), its weight
        ``w'[k, n] = grad[n, k]`` of shape (K, N, OH, OW), and its output ``(C/g, K, KH, KW)`` is
        the gradient with the first two axes exchanged. InvalidProblem for an empty batch, whose
        gradient is zero.
        """
        if self.batch == 0:
            _fail(self, "the gradient of the weights over batch=0 is zero, not a convolution")
        return Conv(
            batch=self.in_channels // self.groups,
            in_channels=self.groups * self.batch,
            height=self.height,
            width=self.width,
            out_channels=self.out_channels,
            rows=self.rows.exchanged(self.height),
            cols=self.cols.exchanged(self.width),
            groups=self.groups,
        )

    def __str__(self) -> str:
        text = f"conv {_input_text(self, self.in_channels)} k{self.out_channels} "
        text += windows_text(self.rows, self.cols)
        return text if self.groups == 1 else f"{text} g{self.groups}"


@dataclass(frozen=True)
class Pool:
    """A pool over an input of shape (N, C, H, W); a batch of 0 is valid. See :class:`Pooling`."""

    kind: str
    batch: int
    channels: int
    height: int
    width: int
    rows: Window
    cols: Window
    count_include_pad: bool = True
    divisor_override: int | None = None

    def __post_init__(self) -> None:
        self.step  # noqa: B018 (building it checks the windows)
        _check_input(self, "channels")
        for axis, window, n in _axes(self):
            _check_fits(self, axis, window, n)
        _check_addressable(self, self.in_shape, self.out_shape)

    @classmethod
    def of(cls, step: Pooling, batch: int, channels: int, height: int, width: int) -> Pool:
        """The step on an input of shape (N, C, H, W); InvalidProblem if it does not fit."""
        return cls(
            step.kind,
            batch,
            channels,
            height,
            width,
            step.rows,
            step.cols,
            step.count_include_pad,
            step.divisor_override,
        )

    @property
    def step(self) -> Pooling:
        """The same without its input, as a step of an epilogue."""
        return Pooling(
            self.kind, self.rows, self.cols, self.count_include_pad, self.divisor_override
        )

    @property
    def whole(self) -> bool:
        """Whether its only window is the whole map."""
        axes = ((self.rows, self.height), (self.cols, self.width))
        return all((w.size, w.dilation, w.low, w.high) == (n, 1, 0, 0) for w, n in axes)

    @property
    def in_shape(self) -> Shape:
        """(N, C, H, W)."""
        return (self.batch, self.channels, self.height, self.width)

    @property
    def out_shape(self) -> Shape:
        """(N, C, OH, OW)."""
        return (self.batch, self.channels, *_out_sizes(self))

    def __str__(self) -> str:
        return f"{self.kind} {_input_text(self, self.channels)} {pooling_text(self.step)}"


@dataclass(frozen=True)
class Block:
    """A convolution and what is done to its result before it is stored, in that order.

    Each kind of step at most once, a pool only as the last. InvalidProblem otherwise.
    """

    conv: Conv
    epilogue: tuple[Step, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.conv, Conv):
            raise InvalidProblem(f"a block starts with a Conv, got {self.conv!r}")
        kinds = [type(step) for step in self.epilogue]
        for place, (step, kind) in enumerate(zip(self.epilogue, kinds, strict=True)):
            if not isinstance(step, Step):
                raise InvalidProblem(f"unknown epilogue step {step!r}: {_STEPS}")
            if kind in kinds[:place]:
                _fail(self, f"the epilogue has more than one {kind.__name__}: {_STEPS}")
            if kind is Pooling and place != len(kinds) - 1:
                _fail(self, f"a pool must be the last step of an epilogue, got {step}")
        self.pool  # noqa: B018 (building the pool checks that it fits)

    # Every call of a layer looks its program up by its block: what is derived is kept.

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self):
        return type(self), (self.conv, self.epilogue)  # a hash is good for one process only

    @cached_property
    def _hash(self) -> int:
        return hash((self.conv, self.epilogue))

    @property
    def in_shape(self) -> Shape:
        """(N, C, H, W)."""
        return self.conv.in_shape

    @cached_property
    def conv_shape(self) -> Shape:
        """(N, K, CH, CW): the convolution's output, before the pool."""
        return self.conv.out_shape

    @cached_property
    def out_shape(self) -> Shape:
        """(N, K, OH, OW): after the pool, if there is one."""
        return self.conv_shape if self.pool is None else self.pool.out_shape

    @cached_property
    def pool(self) -> Pool | None:
        """The pool on the convolution's output, or None."""
        last = self.epilogue[-1] if self.epilogue else None
        return Pool.of(last, *self.conv_shape) if isinstance(last, Pooling) else None

    def __str__(self) -> str:
        steps = self.epilogue or ("",)
        return " | ".join(str(part) for part in (self.conv, *steps)).rstrip()


Problem = Conv | Pool | Block


def conv2d_problem(
    x_shape: Sequence[int],
    w_shape: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Conv:
    """A convolution from the arguments of PyTorch's ``conv2d``: input (N, C, H, W), weight
    (K, C/groups, KH, KW), numbers for both axes or pairs, padding also ``'same'`` or ``'valid'``.

    InvalidProblem names the argument that is wrong, its value and what was expected.
    """
    check_shapes(x_shape, w_shape, groups)
    batch, in_channels, height, width = x_shape
    out_channels, _, *sizes = w_shape
    strides, dilations = pair("stride", stride), pair("dilation", dilation)
    windows = [Window(k, s, d) for k, s, d in zip(sizes, strides, dilations, strict=True)]
    rows, cols = (
        replace(window, low=low, high=high)
        for window, (low, high) in zip(windows, _paddings(padding, windows), strict=True)
    )
    return Conv(batch, in_channels, height, width, out_channels, rows, cols, groups)


def check_shapes(x_shape: Sequence[int], w_shape: Sequence[int], groups: int) -> None:
    """InvalidProblem unless input and weight of these shapes go together in PyTorch's conv2d."""
    for name, shape in (("input", x_shape), ("weight", w_shape)):
        if len(shape) != 4:
            raise InvalidProblem(f"{name} must have 4 dimensions, got shape {tuple(shape)}")
    check_whole("groups", groups, 1)
    in_channels, channels = x_shape[1], w_shape[1]
    if in_channels != channels * groups:
        raise InvalidProblem(
            f"input of shape {tuple(x_shape)} has {in_channels} channels, but weight of shape "
            f"{tuple(w_shape)} with groups={groups} expects {channels}*{groups} = "
            f"{channels * groups}"
        )


def parse(line: str) -> Problem:
    """The problem that a line spells, see the module's docstring; ``parse(str(p)) == p``.

    InvalidProblem names the token it cannot read, or says what is wrong with the problem.
    """
    head, *steps = (part.strip() for part in line.split("|"))
    kind, *tokens = head.split() or [""]
    try:
        if kind == "conv":
            conv = _read_conv(tokens)
            if not steps:
                return conv
            return Block(conv, tuple(read_step(step) for step in steps if steps != [""]))
        if kind not in REDUCTIONS:
            known = ", ".join(["conv", *REDUCTIONS])
            raise InvalidProblem(f"a problem starts with one of {known}, not {kind!r}")
        if steps:
            raise InvalidProblem(f"nothing can follow a pool, got {steps[0]!r}")
        return _read_pool(kind, tokens)
    except InvalidProblem as error:
        raise InvalidProblem(f"cannot read problem {line!r}: {error}") from None


def _read_conv(tokens: Sequence[str]) -> Conv:
    fields = read_fields(tokens, {"n": 1, "c": 3, "k": 1, "g": 1, **WINDOW_COUNTS})
    for letter, meaning in (("n", "batch"), ("c", "channels x height x width"), ("k", "outputs")):
        if letter not in fields:
            raise InvalidProblem(f"no {letter}<{meaning}>")
    (batch,), (channels, height, width), (out_channels,) = fields["n"], fields["c"], fields["k"]
    rows, cols = read_windows(fields, stride=(1, 1))
    (groups,) = fields.get("g", (1,))
    return Conv(batch, channels, height, width, out_channels, rows, cols, groups)


def _read_pool(kind: str, tokens: Sequence[str]) -> Pool:
    fields = read_fields(tokens, {"n": 1, "c": 3, **POOLING_COUNTS}, POOLING_FLAGS)
    for letter, meaning in (("n", "batch"), ("c", "channels x height x width")):
        if letter not in fields:
            raise InvalidProblem(f"no {letter}<{meaning}>")
    (batch,), (channels, height, width) = fields["n"], fields["c"]
    return Pool.of(read_pooling(kind, fields), batch, channels, height, width)


def _paddings(
    padding: int | Sequence[int] | str, windows: Sequence[Window]
) -> list[tuple[int, int]]:
    """(low, high) for each window."""
    if padding == "valid":
        return [(0, 0) for _ in windows]
    if padding == "same":
        if any(window.stride != 1 for window in windows):
            strides = tuple(window.stride for window in windows)
            raise InvalidProblem(f"padding='same' needs stride 1, got stride={strides}")
        return [same_padding(window.size, window.dilation) for window in windows]
    if isinstance(padding, str):
        raise InvalidProblem(f"padding must be numbers, 'same' or 'valid', got {padding!r}")
    paddings = pair("padding", padding)
    if min(paddings) < 0:
        raise InvalidProblem(f"padding must be at least 0, got {padding!r}")
    return [(p, p) for p in paddings]


def _axes(problem: Conv | Pool) -> Iterator[tuple[str, Window, int]]:
    yield "rows", problem.rows, problem.height
    yield "cols", problem.cols, problem.width


def _out_sizes(problem: Conv | Pool) -> tuple[int, int]:
    return problem.rows.out_size(problem.height), problem.cols.out_size(problem.width)


def _input_text(problem: Conv | Pool, channels: int) -> str:
    return f"n{problem.batch} c{channels}x{problem.height}x{problem.width}"


def _check_input(problem: Conv | Pool, channels: str) -> None:
    check_whole("batch", problem.batch, 0)
    for name in (channels, "height", "width"):
        check_whole(name, getattr(problem, name), 1)


def _check_addressable(problem: Problem, *shapes: Shape) -> None:
    for shape in shapes:
        if math.prod(shape) >= 1 << 56:  # kernels count the bytes of all maps in 63 bits
            _fail(problem, f"a tensor of shape {shape}: fewer than 2**56 elements were expected")


def _check_fits(problem: Conv | Pool, axis: str, window: Window, n: int) -> None:
    if window.out_size(n) < 1:
        padded = n if window.base_dilation == 1 else (n - 1) * window.base_dilation + 1
        _fail(
            problem,
            f"{axis}: the kernel spans {window.dilation}*({window.size}-1) + 1 = {window.span}, "
            f"more than the padded input's {window.low} + {padded} + {window.high} = "
            f"{window.low + padded + window.high}; output size {window.formula(n)}",
        )


def _fail(problem: Problem, message: str) -> NoReturn:
    raise InvalidProblem(f"{message} (in {problem})")
