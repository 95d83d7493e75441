"""Walking a model: the layers an input passes, in the order it passes them, and what each one does.

A layer is a module without children, or a fused block. Each is met through a forward hook while
the model runs, so that branches, loops and any other Python in ``forward`` need no analysis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from . import nn as neocog_nn
from .errors import InvalidModel, InvalidProblem, NeocogError
from .given_inputs import Inputs, InputSpec, zeros
from .layer_words import conv_words, pool_words, words_of
from .ownership import Count, Held, Ledger, leaves
from .problem import Conv, Pool, Pooling, conv2d_problem
from .sight import Beyond, Circle, Follow, Sight, joined, tensors_in, through

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Stage:
    """One operation of a layer; a fused block has two, the convolution and the pool.

    Shapes are without the batch. ``problem`` holds the windows of a convolution or pool.
    """

    what: str
    in_shape: Shape
    out_shape: Shape
    problem: Conv | Pool | None = None
    sight: Sight = Beyond.UNKNOWN

    def formulas(self) -> tuple[str, ...]:
        """The output size along rows and columns with its numbers, once if both are the same."""
        if self.problem is None:
            return ()
        rows = self.problem.rows.formula(self.problem.height)
        cols = self.problem.cols.formula(self.problem.width)
        return (rows,) if rows == cols else (rows, cols)

    def unused(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The rows and the columns of the input that no window reaches."""
        if self.problem is None:
            return (), ()
        return (
            self.problem.rows.unused(self.problem.height),
            self.problem.cols.unused(self.problem.width),
        )


@dataclass(frozen=True)
class LayerInfo:
    """One layer as ``neocog summary`` lists it.

    ``dense_weights`` and ``dense_biases`` belong to a fully connected layer between the same
    shapes as the convolution (its own output, before a fused pool). None: not a convolution, or,
    for ``multiply_adds``, not known. ``features`` (inputs, outputs) of a fully connected layer.
    ``weights`` and ``biases`` count what no layer before it holds; ``shared_with`` is the first one
    whose weights it uses too.
    """

    index: int
    name: str
    in_shape: Shape
    out_shape: Shape
    stages: tuple[Stage, ...]
    weights: int
    biases: int
    dense_weights: int | None
    dense_biases: int | None
    multiply_adds: int | None
    features: tuple[int, int] | None = None
    shared_with: int | None = None

    @property
    def what(self) -> str:
        """The stages in words: ``conv 3x3, padding 1, relu + max pool 2x2``."""
        return " + ".join(stage.what for stage in self.stages)

    @property
    def explainable(self) -> bool:
        """Whether it has windows: a convolution or a pool."""
        return self.stages[0].problem is not None


@dataclass
class Capture:
    """What really went into and came out of one layer, copied before anything could change it."""

    info: LayerInfo
    module: nn.Module
    x: Tensor
    residual: Tensor | None
    output: Tensor


@dataclass(frozen=True)
class Walked:
    """The layers that an input passed, what came out, and what stopped it, None if nothing did.

    ``held`` are the parameters beside them, see :mod:`neocog.ownership`.
    """

    layers: list[LayerInfo]
    output: object
    error: NeocogError | None
    held: tuple[Held, ...] = ()


Watch = Callable[[int, str], bool]
Visit = Callable[[Capture, object], None]


def describe(model: nn.Module, in_shape: Sequence[int]) -> list[LayerInfo]:
    """The layers that an input of shape ``in_shape`` (C, H, W, without the batch) passes.

    Runs the model once on zeros, in evaluation mode and without gradients. InvalidProblem or
    InvalidModel, naming the layer, if it cannot take such an input.
    """
    walked = describe_as_far_as_it_goes(model, in_shape)
    if walked.error is not None:
        raise walked.error
    return walked.layers


def describe_as_far_as_it_goes(model: nn.Module, *inputs: Sequence[int] | InputSpec) -> Walked:
    """As :func:`describe`, with the layers up to the one that fails beside the error.

    ``inputs``: shapes without the batch, or more about each (:mod:`neocog.given_inputs`).
    """
    specs = [x if isinstance(x, InputSpec) else InputSpec(tuple(x)) for x in inputs]
    return walk(model, zeros(specs, model))


def walk(
    model: nn.Module,
    x: Tensor | Inputs,
    *,
    watch: Watch = lambda index, name: False,
    visit: Visit = lambda capture, output: None,
    follow: Follow | None = None,
) -> Walked:
    """Runs the model on a batch ``x``, or on several inputs, in evaluation mode without gradients.

    ``watch`` is asked with a layer's position, counted from 1, and its module's name, whether
    ``visit`` is to be called with what went through it, and with what it returned. ``follow`` is
    active while the model runs.
    """
    given = Inputs((x,)) if isinstance(x, Tensor) else x
    state = _Walk(follow or Follow(*given.tensors()), watch, visit)
    error: NeocogError | None = None
    output: object = None
    with ExitStack() as stack:
        stack.enter_context(_evaluating(model))
        for name, module in leaves(model):
            enter, leave = partial(state.enter, name), partial(state.leave, name)
            before = module.register_forward_pre_hook(enter, with_kwargs=True)
            after = module.register_forward_hook(leave, with_kwargs=True)
            stack.callback(before.remove)
            stack.callback(after.remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(state.follow)
        try:
            output = model(*given.args, **given.kwargs)
        except NeocogError as found:
            error = type(found)(f"{state.where}{found}")
            error.__cause__ = found
        except Exception as found:  # what the model raises is the model's
            reason = str(found).strip().split("\n")[0]
            if not isinstance(found, RuntimeError | ValueError | TypeError | IndexError):
                reason = f"{type(found).__name__}: {reason}"
            error = InvalidModel(
                f"{state.where}the model cannot take an input of {given}: {reason}"
            )
            error.__cause__ = found
    return Walked(state.layers, output, error, tuple(state.ledger.held(model)))


def observe(
    model: nn.Module, x: Tensor, watch: Watch = lambda index, name: False
) -> tuple[list[LayerInfo], Capture | None]:
    """Runs the model on a batch ``x`` and returns its layers and the first one ``watch`` accepts.

    Errors as :func:`describe`.
    """
    found: list[Capture] = []
    first = lambda index, name: not found and watch(index, name)  # noqa: E731
    walked = walk(model, x, watch=first, visit=lambda capture, output: found.append(capture))
    if walked.error is not None:
        raise walked.error
    return walked.layers, found[0] if found else None


def size_text(shape: Sequence[int]) -> str:
    """``1x28x28``."""
    return "x".join(str(size) for size in shape)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@dataclass
class _Walk:
    """The state of one run: the layers passed so far, and where the run is."""

    follow: Follow
    watch: Watch
    visit: Visit
    layers: list[LayerInfo] = field(default_factory=list)
    where: str = ""
    ledger: Ledger = field(default_factory=Ledger)
    _entered: dict[nn.Module, tuple[Tensor, Sight]] = field(default_factory=dict)

    def enter(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        index = len(self.layers) + 1
        self.where = f"layer {index} ({name}, {type(module).__name__}): "
        x = _input(args, kwargs)
        if x is not None:
            _check_takes(module, tuple(x.shape))
            # Copied, for what follows may overwrite it: ReLU(inplace=True) does.
            self._entered[module] = (
                _copied(x) if self.watch(index, name) else x,
                self.follow.of(x),
            )
        self.follow.enter(_inputs(module, args, kwargs))

    def leave(
        self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: object
    ) -> None:
        self.follow.leave()
        result = output[0] if isinstance(output, (tuple, list)) else output
        if module not in self._entered or not isinstance(result, Tensor):
            return
        x, sight = self._entered.pop(module)
        residual = _residual(module, args, kwargs)
        stages = self._stages(module, x, sight, residual, result)
        index = len(self.layers) + 1
        self.layers.append(_info(index, name, module, stages, self.ledger.take(module, index)))
        if self.watch(index, name):
            kept = None if residual is None else _copied(residual)
            self.visit(Capture(self.layers[-1], module, x, kept, _copied(result)), output)
        self.where = f"after layer {index} ({name}): "

    def _stages(
        self, module: nn.Module, x: Tensor, sight: Sight, residual: Tensor | None, output: Tensor
    ) -> tuple[Stage, ...]:
        problems = windows_of(module, tuple(x.shape))
        if not problems:
            out = tuple(output.shape[1:])
            return (Stage(words_of(module), tuple(x.shape[1:]), out, None, self.follow.of(output)),)
        stages = []
        for problem in problems:
            sight = through(sight, problem.rows, problem.cols, _circle(module, problem))
            if residual is not None and isinstance(problem, Conv):
                sight = joined((sight, self.follow.of(residual)))
            what = conv_words(module, problem) if isinstance(problem, Conv) else pool_words(problem)
            shapes = problem.in_shape[1:], problem.out_shape[1:]
            stages.append(Stage(what, *shapes, problem, sight))
        self.follow.note(output, sight)
        return tuple(stages)


def _circle(module: nn.Module, problem: Conv | Pool) -> Circle:
    mode = getattr(module, "padding_mode", "zeros")
    around = mode == "circular" and isinstance(problem, Conv)
    return (problem.height, problem.width) if around else (None, None)


def _check_takes(module: nn.Module, in_shape: Shape) -> None:
    """Says what is wrong with an input better than the layer itself would: with the formula."""
    windows_of(module, in_shape)
    if isinstance(module, nn.Linear) and in_shape and in_shape[-1] != module.in_features:
        raise InvalidProblem(
            f"a fully connected layer of {module.in_features} x {module.out_features} weights "
            f"takes {module.in_features} numbers in its last axis, got {in_shape[-1]}"
        )


# A subclass with a way of its own does who knows what.
_FORWARDS = {nn.Conv2d.forward, nn.MaxPool2d.forward, nn.AvgPool2d.forward}
_FORWARDS |= {
    cls.forward for cls in (neocog_nn.ConvBlock, neocog_nn.MaxPool2d, neocog_nn.AvgPool2d)
}
_CONVOLVING = {None, nn.Conv2d._conv_forward, neocog_nn.Conv2d._conv_forward}


def windows_of(module: nn.Module, in_shape: Shape) -> tuple[Conv | Pool, ...]:
    """The convolution and the pool that a module does on an input (N, C, H, W), those there are."""
    kind = type(module)
    if len(in_shape) != 4 or kind.forward not in _FORWARDS:
        return ()
    if getattr(kind, "_conv_forward", None) not in _CONVOLVING:
        return ()
    if isinstance(module, nn.AvgPool2d) or (
        isinstance(module, nn.MaxPool2d) and not module.return_indices
    ):
        return _pools(neocog_nn.pooling_of(module), in_shape)
    if not isinstance(module, nn.Conv2d):
        return ()
    window = (module.stride, module.padding, module.dilation, module.groups)
    conv = conv2d_problem(in_shape, module.weight.shape, *window)
    pooling = module.pooling if isinstance(module, neocog_nn.ConvBlock) else None
    return (conv, *_pools(pooling, conv.out_shape))


def _pools(pooling: Pooling | None, in_shape: Shape) -> tuple[Pool, ...]:
    batch, channels, height, width = in_shape
    return () if pooling is None else (Pool.of(pooling, batch, channels, height, width),)


def _copied(tensor: Tensor) -> Tensor:
    """A copy that nobody who watches the model's functions sees."""
    with torch._C.DisableTorchFunction():
        return tensor.detach().clone()


def _inputs(module: nn.Module, args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensors a layer is given, its input first and its residual second."""
    found = [_input(args, kwargs), _residual(module, args, kwargs)]
    rest = [t for t in tensors_in((args, kwargs)) if all(t is not other for other in found)]
    return [*(t for t in found if t is not None), *rest]


def _input(args: tuple, kwargs: dict) -> Tensor | None:
    if isinstance(kwargs.get("input"), Tensor):
        return kwargs["input"]
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def _residual(module: nn.Module, args: tuple, kwargs: dict) -> Tensor | None:
    if not isinstance(module, neocog_nn.ConvBlock):
        return None
    return args[1] if len(args) > 1 else kwargs.get("residual")


def _info(
    index: int, name: str, module: nn.Module, stages: tuple[Stage, ...], count: Count
) -> LayerInfo:
    first, last = stages[0], stages[-1]
    conv = first.problem if isinstance(first.problem, Conv) else None
    return LayerInfo(
        index=index,
        name=name,
        in_shape=first.in_shape,
        out_shape=last.out_shape,
        stages=stages,
        weights=count.weights,
        biases=count.biases,
        dense_weights=math.prod(conv.in_shape[1:] + conv.out_shape[1:]) if conv else None,
        dense_biases=math.prod(conv.out_shape[1:]) if conv else None,
        multiply_adds=_multiply_adds(module, first),
        features=(module.in_features, module.out_features)
        if isinstance(module, nn.Linear) and count.shared_with is None
        else None,
        shared_with=count.shared_with,
    )


def _multiply_adds(module: nn.Module, stage: Stage) -> int | None:
    """Of one picture; a pool compares or adds, which counts as none. None: not known."""
    if isinstance(stage.problem, Conv):
        return stage.problem.multiply_adds
    if isinstance(module, nn.Linear):
        return math.prod(stage.out_shape) * module.in_features
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return math.prod(stage.out_shape)  # one scale and shift a value
    return None if any(True for _ in module.parameters()) else 0
