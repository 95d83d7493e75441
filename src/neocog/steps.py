"""The steps that may follow a convolution before its result is stored, and what problems share.

A step is a small frozen value that prints as one word or a few. The checks and the spelling of
windows stand here too, beneath :mod:`neocog.problem`, which re-exports the steps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .activations import ACTIVATIONS
from .errors import InvalidProblem
from .geometry import Window
from .reductions import REDUCTIONS


@dataclass(frozen=True)
class Bias:
    """Adds ``bias[k]`` to output channel k."""

    def __str__(self) -> str:
        return "bias"


@dataclass(frozen=True)
class Affine:
    """Turns v of channel k into ``scale[k]*v + shift[k]``: a batch norm at inference."""

    def __str__(self) -> str:
        return "affine"


@dataclass(frozen=True)
class Add:
    """Adds a residual of the convolution's output shape, element by element."""

    def __str__(self) -> str:
        return "add"


@dataclass(frozen=True)
class Act:
    """Applies the activation of that name (a row of ``activations.ACTIVATIONS``)."""

    name: str
    slope: float = 0.0

    def __post_init__(self) -> None:
        row = ACTIVATIONS.get(self.name)
        if row is None:
            raise InvalidProblem(
                f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.name!r}"
            )
        if not isinstance(self.slope, (int, float)) or not -math.inf < self.slope < math.inf:
            raise InvalidProblem(f"slope must be a finite number, got {self.slope!r}")
        if self.slope and not row.takes_slope:
            raise InvalidProblem(f"{self.name} has no slope, got slope={self.slope!r}")

    @property
    def monotone(self) -> bool:
        """Whether a maximum may be taken before the activation instead of after it."""
        return ACTIVATIONS[self.name].monotone and self.slope >= 0

    def __str__(self) -> str:
        return f"{self.name}({self.slope!r})" if ACTIVATIONS[self.name].takes_slope else self.name


@dataclass(frozen=True)
class Pooling:
    """A pool before it meets its input: what it does, on windows of which kind.

    ``kind`` is a row of ``reductions.REDUCTIONS``. A mean divides by ``divisor_override`` if given,
    else by the number of positions its window covers, padding counted or not. InvalidProblem
    where PyTorch refuses too, and for windows that no pool has.
    """

    kind: str
    rows: Window
    cols: Window
    count_include_pad: bool = True
    divisor_override: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in REDUCTIONS:
            raise InvalidProblem(
                f"pooling kind must be one of {', '.join(REDUCTIONS)}, got {self.kind!r}"
            )
        for axis, window in (("rows", self.rows), ("cols", self.cols)):
            self._check_axis(axis, window)
        if self.rows.ceil != self.cols.ceil:
            raise InvalidProblem("ceil must be the same for rows and cols")
        if self.divisor_override is not None:
            check_whole("divisor_override", self.divisor_override, None)
            if self.divisor_override == 0:
                raise InvalidProblem("divisor_override must not be 0")
        if REDUCTIONS[self.kind].selects and not (
            self.count_include_pad and self.divisor_override is None
        ):
            raise InvalidProblem(
                f"{self.kind} pooling does not divide: count_include_pad and divisor_override "
                f"are for mean, got {self.count_include_pad} and {self.divisor_override}"
            )

    def _check_axis(self, axis: str, window: Window) -> None:
        check_window(axis, window)
        for name in ("low", "high"):
            padding = getattr(window, name)
            if not 0 <= padding <= window.size // 2:
                raise InvalidProblem(
                    f"{axis}: the padding of a pool must be from 0 to half its kernel, "
                    f"{window.size} // 2 = {window.size // 2}, got {name}={padding}"
                )
        if window.base_dilation != 1:
            raise InvalidProblem(
                f"{axis}: a pool has no base dilation, got base_dilation={window.base_dilation}"
            )
        if window.dilation != 1 and not REDUCTIONS[self.kind].selects:
            raise InvalidProblem(
                f"{axis}: {self.kind} pooling has no dilation, got dilation={window.dilation}"
            )

    def __str__(self) -> str:
        return f"{self.kind} {pooling_text(self)}"


Step = Bias | Affine | Add | Act | Pooling


def pooling(
    kind: str,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Pooling:
    """A pool from the arguments of PyTorch's ``max_pool2d`` and ``avg_pool2d``.

    Numbers stand for both axes or come in pairs (rows, cols); the stride is the kernel size unless
    given. InvalidProblem names the argument that is wrong.
    """
    sizes = pair("kernel_size", kernel_size)
    strides = sizes if stride is None else pair("stride", stride)
    paddings, dilations = pair("padding", padding), pair("dilation", dilation)
    rows, cols = (
        Window(size, s, d, low=p, high=p, ceil=bool(ceil_mode))
        for size, s, d, p in zip(sizes, strides, dilations, paddings, strict=True)
    )
    return Pooling(kind, rows, cols, bool(count_include_pad), divisor_override)


def pair(name: str, value: object) -> tuple[int, int]:
    """One number for both axes, or one for each; InvalidProblem otherwise."""
    values = value if isinstance(value, Sequence) else (value,)
    whole = [v for v in values if isinstance(v, int) and not isinstance(v, bool)]
    if len(whole) == len(values) and len(values) in (1, 2):
        return whole[0], whole[-1]
    raise InvalidProblem(f"{name} must be a whole number or a pair of them, got {value!r}")


def check_whole(name: str, value: object, least: int | None) -> None:
    """InvalidProblem unless ``value`` is an int and not below ``least``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidProblem(
            f"{name} must be a whole number, got {value!r} of type {type(value).__name__}"
        )
    if least is not None and value < least:
        raise InvalidProblem(f"{name} must be at least {least}, got {value}")


def check_window(axis: str, window: object) -> None:
    """InvalidProblem unless every field of the window is an int in its range."""
    if not isinstance(window, Window):
        raise InvalidProblem(f"{axis} must be a geometry.Window, got {window!r}")
    for name in ("size", "stride", "dilation", "base_dilation"):
        kernel = "kernel size" if name == "size" else name
        check_whole(f"{axis}: {kernel}", getattr(window, name), 1)
    for name in ("low", "high"):
        check_whole(f"{axis}: {name} padding", getattr(window, name), None)


# Spelling: the tokens that describe windows, the same in problems and in steps.

_TOKEN = re.compile(r"([a-z]*)(-?\d+(?:[x,]-?\d+)*)")
WINDOW_COUNTS = {"": 2, "s": 2, "p": 4, "d": 2, "b": 2}
POOLING_COUNTS = {"": 2, "s": 2, "p": 4, "d": 2, "div": 1}
POOLING_FLAGS = ("ceil", "exclude_pad")


def windows_text(rows: Window, cols: Window) -> str:
    """``3x3 s1x1 p1,1,1,1``, then dilation and base dilation where they are not 1."""
    text = f"{rows.size}x{cols.size} s{rows.stride}x{cols.stride} "
    text += f"p{rows.low},{rows.high},{cols.low},{cols.high}"
    for letter, pair_ in (
        ("d", (rows.dilation, cols.dilation)),
        ("b", (rows.base_dilation, cols.base_dilation)),
    ):
        if pair_ != (1, 1):
            text += f" {letter}{pair_[0]}x{pair_[1]}"
    return text


def pooling_text(step: Pooling) -> str:
    """The windows, then ``ceil``, ``exclude_pad`` and ``div`` where they are on."""
    text = windows_text(step.rows, step.cols)
    text += " ceil" if step.rows.ceil else ""
    text += "" if step.count_include_pad else " exclude_pad"
    return text if step.divisor_override is None else f"{text} div{step.divisor_override}"


def read_fields(
    tokens: Sequence[str], counts: dict[str, int], flags: Sequence[str] = ()
) -> dict[str, tuple[int, ...]]:
    """The numbers of every token by its letter: ``["s2", "3x3"]`` -> ``{"s": (2, 2), "": (3, 3)}``.

    ``counts`` says which letters there are and how many numbers each takes; one number stands for
    all of them. Flags come without numbers. InvalidProblem names the first token that is unknown,
    repeated or has the wrong number of numbers.
    """
    fields: dict[str, tuple[int, ...]] = {}
    for token in tokens:
        match = _TOKEN.fullmatch(token)
        letter = match.group(1) if match else token
        if letter in fields:
            raise InvalidProblem(f"{token!r} comes twice")
        if match is None and token in flags:
            fields[token] = ()
            continue
        if match is None or letter not in counts:
            known = ", ".join([*(f"{key}<number>" for key in counts), *flags])
            raise InvalidProblem(f"unknown token {token!r}, expected one of {known}")
        numbers = tuple(int(number) for number in re.split("[x,]", match.group(2)))
        if len(numbers) not in (1, counts[letter]):
            raise InvalidProblem(
                f"{token!r} has {len(numbers)} numbers, expected 1 or {counts[letter]}"
            )
        fields[letter] = numbers * (counts[letter] // len(numbers))
    return fields


def read_windows(
    fields: dict[str, tuple[int, ...]], stride: tuple[int, ...] | None = None
) -> tuple[Window, Window]:
    """The two windows among the fields; without one of its own a window has the stride given."""
    if "" not in fields:
        raise InvalidProblem("no kernel size, such as 3x3")
    sizes = fields[""]
    strides = fields.get("s", stride or sizes)
    paddings = fields.get("p", (0, 0, 0, 0))
    rows, cols = (
        Window(
            size=sizes[axis],
            stride=strides[axis],
            dilation=fields.get("d", (1, 1))[axis],
            low=paddings[2 * axis],
            high=paddings[2 * axis + 1],
            base_dilation=fields.get("b", (1, 1))[axis],
            ceil="ceil" in fields,
        )
        for axis in (0, 1)
    )
    return rows, cols


def read_pooling(kind: str, fields: dict[str, tuple[int, ...]]) -> Pooling:
    """A pool from its fields, see ``POOLING_COUNTS``."""
    rows, cols = read_windows(fields)
    divisor = fields.get("div")
    return Pooling(kind, rows, cols, "exclude_pad" not in fields, divisor[0] if divisor else None)


def read_step(text: str) -> Step:
    """One step of an epilogue from its spelling; InvalidProblem names what it cannot read."""
    simple: dict[str, Step] = {str(step): step for step in (Bias(), Affine(), Add())}
    if text in simple:
        return simple[text]
    head, *tokens = text.split() or [""]
    if head in REDUCTIONS:
        return read_pooling(head, read_fields(tokens, POOLING_COUNTS, POOLING_FLAGS))
    call = re.fullmatch(r"(\w+)(?:\(([^()]+)\))?", text)
    if call is None or call.group(1) not in ACTIVATIONS:
        known = ", ".join([*simple, *ACTIVATIONS, *REDUCTIONS])
        raise InvalidProblem(f"unknown step {text!r}, expected one of {known}")
    slope = call.group(2) or "0"
    try:
        return Act(call.group(1), float(slope))
    except ValueError as error:
        if isinstance(error, InvalidProblem):
            raise
        raise InvalidProblem(f"the slope of {text!r} is no number: {slope!r}") from None
