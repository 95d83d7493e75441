"""What each tensor of a running model sees of the input: receptive fields, through branches too.

Windows change a receptive field and say so themselves (:meth:`Follow.note`). Everything between
them is followed by watching every torch function that the model calls: those that work position by
position keep the field, those that join branches of the same jump widen it to cover both. What is
none of these is not guessed at: the field is unknown from there on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from torch import Tensor
from torch.overrides import TorchFunctionMode

from .geometry import ReceptiveField, Window, joined_periods


@dataclass(frozen=True)
class Field:
    """The window of the input that every position of a map sees."""

    rows: ReceptiveField = ReceptiveField()
    cols: ReceptiveField = ReceptiveField()

    def through(self, rows: Window, cols: Window, circle: Circle = (None, None)) -> Field:
        """The field after a convolution or a pool."""
        return Field(self.rows.through(rows, circle[0]), self.cols.through(cols, circle[1]))

    @property
    def round(self) -> bool:
        """Whether it leads over an edge of the input to the opposite one."""
        return self.rows.period is not None or self.cols.period is not None


class Beyond(Enum):
    """What is no window of the input."""

    ALL = "all"  # every value may see the whole input
    FLAT = "flat"  # each value sees a window, but its position is gone
    UNKNOWN = "?"


Sight = Field | Beyond


Circle = tuple[int | None, int | None]
"""Height and width of a map that is padded in a circle; None for one that is not."""


def through(sight: Sight, rows: Window, cols: Window, circle: Circle = (None, None)) -> Sight:
    """What a convolution or a pool sees whose input sees ``sight``."""
    if isinstance(sight, Field):
        return sight.through(rows, cols, circle)
    return sight if sight is Beyond.ALL else Beyond.UNKNOWN


def joined(sights: Iterable[Sight]) -> Sight:
    """What the sum of branches sees, position by position.

    Branches of different jumps stand on different grids; their sum has no single window.
    """
    kinds = set(sights)
    if len(kinds) == 1:
        return kinds.pop()
    fields = [sight for sight in kinds if isinstance(sight, Field)]
    if len(fields) == len(kinds):
        rows = _union([field.rows for field in fields])
        cols = _union([field.cols for field in fields])
        return Field(rows, cols) if rows and cols else Beyond.UNKNOWN
    if kinds & {Beyond.UNKNOWN, Beyond.FLAT}:
        return Beyond.UNKNOWN
    return Beyond.ALL


def _union(fields: list[ReceptiveField]) -> ReceptiveField | None:
    if len({field.jump for field in fields}) != 1:
        return None
    start = min(field.start for field in fields)
    stop = max(field.start + field.size for field in fields)
    period = joined_periods(field.period for field in fields)
    return ReceptiveField(stop - start, fields[0].jump, start, period)


# Functions by their Python names: the operator, the method and the function share one row.
_POSITION_BY_POSITION = frozenset(
    {
        *("add", "add_", "__add__", "__radd__", "__iadd__", "sub", "sub_", "__sub__", "__rsub__"),
        *("__isub__", "mul", "mul_", "__mul__", "__rmul__", "__imul__", "div", "div_"),
        *("__truediv__", "__itruediv__", "neg", "abs", "clamp", "exp", "sqrt", "maximum"),
        *("minimum", "relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "prelu", "elu"),
        *("selu", "celu", "gelu", "silu", "mish", "sigmoid", "tanh", "hardtanh", "hardsigmoid"),
        *("hardswish", "softplus", "dropout", "dropout2d", "batch_norm", "cat", "concat"),
        *("concatenate", "clone", "contiguous", "detach", "to", "float", "double"),
    }
)
_RESHAPING = frozenset({"flatten", "view", "reshape", "squeeze"})
_SUMMARISING = frozenset({"mean", "sum", "amax", "adaptive_avg_pool2d", "adaptive_max_pool2d"})


class Follow(TorchFunctionMode):
    """While active, follows what the tensors made from inputs (N, C, H, W or other) see of them.

    What is made of several inputs sees the same window of each, or it is not known what.
    Keeps every tensor it has met alive, so that no other takes over its identity.
    """

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self._met: dict[int, tuple[Tensor, Sight]] = {}
        for x in inputs:
            self.note(x, Field() if x.ndim == 4 else Beyond.FLAT if x.ndim == 2 else Beyond.UNKNOWN)

    def note(self, tensor: Tensor, sight: Sight) -> None:
        """Says what a tensor sees; overrides what was concluded from the functions called."""
        self._met[id(tensor)] = (tensor, sight)

    def enter(self, inputs: list[Tensor]) -> None:
        """A layer begins, given these tensors: whoever records layers may want to know."""

    def leave(self) -> None:
        """The layer that was entered last is done."""

    def of(self, tensor: Tensor) -> Sight:
        """What a tensor sees; unknown for one that was not made from the input."""
        return self._met[id(tensor)][1] if id(tensor) in self._met else Beyond.UNKNOWN

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        # Tensors never met are constants: weights, scales.
        inputs = [t for t in tensors_in((args, kwargs)) if id(t) in self._met]
        if inputs:
            for output in tensors_in(result):
                self.note(output, self._after(getattr(func, "__name__", ""), inputs, output))
        return result

    def _after(self, name: str, inputs: list[Tensor], output: Tensor) -> Sight:
        sight = joined(self.of(tensor) for tensor in inputs)
        first = inputs[0]
        if name in _POSITION_BY_POSITION:
            same_grid = all(tensor.shape[2:] == output.shape[2:] for tensor in inputs)
            one_for_all = joined(self.of(t) for t in inputs if t.shape[2:] != output.shape[2:])
            return sight if same_grid or one_for_all is Beyond.ALL else Beyond.UNKNOWN
        if name in _RESHAPING and sight is not Beyond.UNKNOWN:
            flat = output.ndim == 2 and output.shape[0] == first.shape[0]
            return sight if sight is Beyond.ALL else Beyond.FLAT if flat else Beyond.UNKNOWN
        if name in _SUMMARISING and first.ndim == 4:
            one_a_channel = output.shape[:2] == first.shape[:2] and output[0, 0].numel() == 1
            seen = isinstance(sight, Field) or sight is Beyond.ALL
            return Beyond.ALL if one_a_channel and seen else Beyond.UNKNOWN
        if name == "linear" and first.ndim == 2 and sight in (Beyond.FLAT, Beyond.ALL):
            return Beyond.ALL
        return Beyond.UNKNOWN


def tensors_in(values: object) -> Iterator[Tensor]:
    """The tensors in a value, inside lists, tuples and dictionaries too."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from tensors_in(list(values.values()))
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from tensors_in(value)
