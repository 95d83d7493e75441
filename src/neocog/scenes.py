"""Scenes: everything that one picture causes inside a network, as boxes and the lines between them.

The model runs once, as it always does. Each layer it passes and each PyTorch function that it calls
between layers becomes a :class:`Box`: an operation of :mod:`neocog.network`, or none where neocog
does not know what is done; the boxes it reads; and a copy of its result. A fused
:class:`neocog.nn.ConvBlock` becomes a box for each of its steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from . import functional
from . import network as net
from . import nn as neocog_nn
from .activations import ACTIVATIONS
from .errors import InvalidProblem, NeocogError
from .layer_calls import CALLS, Call
from .layer_words import activation_of
from .layers import Capture, LayerInfo, walk, windows_of
from .problem import Act, Conv, Pool
from .sight import Beyond, Follow, Sight, tensors_in, through

# Functions of the same values in the same order, if shape and type stay: what comes out is what
# went in.
_UNCHANGED = frozenset({"contiguous", "clone", "detach", "to", "float", "double"})
_DATA = Tensor.data.__get__  # type: ignore[attr-defined]


@dataclass(eq=False)
class Box:
    """One operation of a scene. Box 0 is the picture and has none.

    ``output`` (1, C, H, W), (1, C) or whatever a function gave that neocog does not know: ``op``
    is then None. ``inputs`` are positions in :attr:`Scene.boxes`. ``layer`` is the layer it belongs
    to, None for a function called between layers. ``own`` is the result of a layer of the model;
    the steps inside a fused block are computed again for showing.
    """

    name: str
    op: net.Op | None
    inputs: tuple[int, ...]
    output: Tensor
    sight: Sight
    layer: LayerInfo | None = None
    what: str = ""
    own: bool = True


@dataclass
class Scene:
    """Boxes in the order in which they were computed, and what stopped the model, if anything.

    ``parameters`` are the tensors that operations name; ``answer`` is the box that the model
    returned, the first of several, None if it returned something else.
    """

    boxes: list[Box]
    parameters: dict[str, Tensor] = field(default_factory=dict)
    answer: int | None = None
    error: NeocogError | None = None

    def blocks(self) -> list[list[int]]:
        """The boxes by block: a head and what follows it as a fused epilogue would.

        Norms, activations, sums, products and one pool join the box before them if nobody else
        reads that.
        """
        readers = [0] * len(self.boxes)
        for box in self.boxes:
            for source in box.inputs:
                readers[source] += 1
        found: list[list[int]] = [[0]]
        where = {0: 0}
        for index, box in enumerate(self.boxes[1:], 1):
            tails = [i for i in box.inputs if i == found[where[i]][-1] and i and readers[i] == 1]
            block = found[where[max(tails)]] if tails else None
            pooled = block and any(isinstance(self.boxes[i].op, net.Pooling) for i in block)
            if block is None or not _joins(box.op) or pooled:
                found.append([index])
                where[index] = len(found) - 1
            else:
                block.append(index)
                where[index] = where[block[0]]
        return found


def _joins(op: net.Op | None) -> bool:
    if isinstance(op, net.Pooling):
        return op.pool.out_shape[2:] != (1, 1)  # one that summarises the map stands for itself
    return isinstance(op, net.BatchNorm | net.Activation | net.Arithmetic)


def record(model: nn.Module, x: Tensor) -> Scene:
    """The scene of ``model(x)`` for a batch of one, (1, C, H, W) or (1, C).

    A model that cannot take ``x`` gives the boxes up to the layer that failed, and the error.
    InvalidProblem if ``x`` is no batch of one.
    """
    if x.ndim < 2 or x.shape[0] != 1:
        raise InvalidProblem(f"x must be a batch of one picture, got {tuple(x.shape)}")
    x = x.detach().clone()  # the model may write to it
    recorder = _Recorder(model, x)
    walked = walk(
        model,
        x,
        watch=lambda index, name: True,
        visit=recorder.layer,
        follow=recorder,
    )
    recorder.flush()
    answers = [recorder.made(t) for t in tensors_in(walked.output)]
    return Scene(
        recorder.boxes,
        recorder.parameters,
        next((index for index in answers if index is not None), None),
        walked.error,
    )


@dataclass
class _Called:
    """A function that was called: what it read, and copies of what it gave."""

    name: str
    call: Call | Tensor | None
    inputs: list[Tensor]
    outputs: list[Tensor]
    copies: list[Tensor]
    unchanged: bool
    """Whether its result has the values of its first input."""


class _Recorder(Follow):
    """Follows the tensors of a run, and makes a box of each step."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        super().__init__(x)
        self.boxes = [Box("image", None, (), x.clone(), self.of(x))]
        self.parameters: dict[str, Tensor] = {}
        tensors = [*model.named_parameters(), *model.named_buffers()]
        self._names = {id(t): name for name, t in tensors}
        self._made: dict[int, tuple[int, int]] = {}  # id of a tensor: its box and its version
        self._kept: list[Tensor] = []  # ids stay unique while their tensors live
        self._inside = False
        self._inputs: list[Tensor] = []
        self._calls: list[_Called] = []
        self._left: list[_Called] = []  # calls inside the layer that was left last
        self._bind(x, 0)

    # ---------------------------------------------------------------- tensors and their boxes

    def made(self, tensor: Tensor) -> int | None:
        """The box of a tensor, None if it has none."""
        if id(tensor) not in self._made:
            return None
        index, version = self._made[id(tensor)]
        if version != _version(tensor):  # written to by something that returned nothing
            box = Box("in place", None, (index,), tensor, self.of(tensor), what="in place")
            index = self._add(box, tensor)
        return index

    def _sources(self, tensors: list[Tensor]) -> tuple[int, ...]:
        found = (self.made(t) for t in tensors)
        return tuple(dict.fromkeys(index for index in found if index is not None))

    def _operands(self, call: Call) -> tuple[int, ...] | None:
        """The boxes of all that an operation reads, None if one of them is no box."""
        found = [self.made(t) for t in call.inputs]
        return None if None in found else tuple(i for i in found if i is not None)

    def _bind(self, tensor: Tensor, index: int) -> None:
        self._made[id(tensor)] = index, _version(tensor)
        self._kept.append(tensor)

    def _add(self, box: Box, result: Tensor) -> int:
        if box.output is result:
            with torch._C.DisableTorchFunction():
                box.output = result.detach().clone()
        self.boxes.append(box)
        self._bind(result, len(self.boxes) - 1)
        return len(self.boxes) - 1

    def _name_of(self, tensor: Tensor | None) -> str | None:
        if tensor is None:
            return None
        name = self._names.setdefault(id(tensor), f"tensor {len(self._names)}")
        self._kept.append(tensor)
        self.parameters[name] = tensor.detach()
        return name

    # ---------------------------------------------------------------- functions

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        known = [t for t in tensors_in((args, kwargs)) if id(t) in self._met]
        if not known:
            return super().__torch_function__(func, types, args, kwargs)
        name = getattr(func, "__name__", str(func)).strip("_")
        if name != "get":  # reading a shape, as who watches layers does, changes nothing
            self._settle(known)
        call = self._described(func, args, kwargs)
        shape, dtype = known[0].shape, known[0].dtype
        versions = [_version(t) for t in known]
        result = super().__torch_function__(func, types, args, kwargs)
        outputs = [known[0]] if name == "setitem" else list(tensors_in(result))
        if not outputs:
            return result
        if name == "get":
            self._settle(known)
        for tensor, version in zip(known, versions, strict=True):
            if id(tensor) in self._made and _version(tensor) != version:  # written to just now
                self._bind(tensor, self._made[id(tensor)][0])
        same = name in _UNCHANGED or func == _DATA
        same = same and (outputs[0].shape, outputs[0].dtype) == (shape, dtype)
        copies = [t.detach().clone() for t in outputs]
        same = same or isinstance(call, Tensor)
        self._calls.append(_Called(name, call, known, outputs, copies, same))
        if not self._inside:
            self.flush()
        return result

    def _settle(self, tensors: list[Tensor]) -> None:
        """Whatever happened before comes before what these tensors are read for now."""
        if not self._inside:
            self.flush()
        self._sources(tensors)

    def _described(self, func, args, kwargs) -> Call | Tensor | None:
        found = CALLS.get(func)
        try:
            return None if found is None else found(self._name_of, *args, **kwargs)
        except Exception:  # PyTorch does it, or refuses it in its own words
            return None

    def flush(self) -> None:
        """Makes boxes of functions: those between layers, or in a layer that nobody visited."""
        calls, self._calls, self._left = [*self._left, *self._calls], [], []
        for called in calls:
            self._function(called)

    def _function(self, called: _Called) -> None:
        sources = self._sources(called.inputs)
        if not sources or not called.outputs:
            return
        if called.unchanged:
            self._bind(called.outputs[0], sources[0])
            return
        op = None
        if isinstance(called.call, Call):
            operands = self._operands(called.call)
            op, sources = (None, sources) if operands is None else (called.call.op, operands)
        windows = _windows(op)
        result = called.outputs[0]
        if windows is not None and self.of(result) is not Beyond.ALL:
            self.note(result, through(self.boxes[sources[0]].sight, windows.rows, windows.cols))
        for output, copy in zip(called.outputs, called.copies, strict=True):
            sight = self.of(output)
            self._add(Box(called.name, op, sources, copy, sight, what=called.name), output)

    # ---------------------------------------------------------------- layers

    def enter(self, inputs: list[Tensor]) -> None:
        self._settle(inputs)
        self._inside, self._inputs = True, inputs

    def leave(self) -> None:
        self._inside, self._left, self._calls = False, self._calls, []

    def layer(self, found: Capture, output: object) -> None:
        """A layer is done: what it was given, and what it returned."""
        calls, self._left = self._left, []
        results = list(tensors_in(output))
        result, module, info = results[0], found.module, found.info
        sources = self._sources(self._inputs)
        if not sources or (not calls and any(result is t for t in self._inputs)):
            return  # it has nothing to do with the picture, or is an identity
        if len(calls) == 1 and calls[0].unchanged and self.made(calls[0].inputs[0]) is not None:
            self._bind(result, self._sources(calls[0].inputs)[0])  # a dropout
            return
        if type(module).__module__ == neocog_nn.__name__:
            problems = windows_of(module, tuple(found.x.shape))
            zeros = getattr(module, "padding_mode", "zeros") == "zeros"
            known = all(self.made(t) is not None for t in self._inputs)
            if problems and zeros and known and problems[-1].out_shape == tuple(result.shape):
                self._windows(found, problems, sources, result)
                return
        op = None
        if len(calls) == 1 and isinstance(calls[0].call, Call):
            operands = self._operands(calls[0].call)
            if operands is not None and calls[0].call.shape == tuple(result.shape):
                op, sources = calls[0].call.op, operands
        sight = self.of(result)
        self._add(Box(info.name, op, sources, found.output, sight, info, info.what), result)
        for other in results[1:]:
            box = Box(info.name, None, sources, other, self.of(other), info, info.what)
            self._add(box, other)

    def _windows(
        self,
        found: Capture,
        problems: tuple[Conv | Pool, ...],
        sources: tuple[int, ...],
        result: Tensor,
    ) -> None:
        """The steps of a convolution, a pool or a fused block of both."""
        info = found.info
        with torch._C.DisableTorchFunction():
            steps = _steps(found.module, found, problems, self._name_of)
        place = sources[0]
        for number, (op, value) in enumerate(steps):
            last = number == len(steps) - 1
            inputs = (place, sources[-1]) if isinstance(op, net.Arithmetic) else (place,)
            stage = info.stages[-1 if last else 0]
            output = found.output if last else value
            assert output is not None
            box = Box(info.name, op, inputs, output, stage.sight, info, stage.what, last)
            place = self._add(box, result if last else output)


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to; 0 for tensors that do not count."""
    with torch._C.DisableTorchFunction():
        return 0 if tensor.is_inference() else tensor._version


def _steps(
    module: nn.Module, found: Capture, problems: tuple[Conv | Pool, ...], name
) -> list[tuple[net.Op, Tensor | None]]:
    """The operations of a layer with windows and their results, None for the last one's."""
    first, last = problems[0], problems[-1]
    if isinstance(first, Pool):
        return [(net.Pooling(first), None)]
    assert isinstance(module, nn.Conv2d)
    act = activation_of(module)
    ops: list[net.Op] = [net.Convolution(first, name(module.weight), name(module.bias))]
    ops += [] if found.residual is None else [net.Arithmetic("add")]
    ops += [] if act.name == "identity" else [net.Activation(act)]
    ops += [net.Pooling(last)] if isinstance(last, Pool) else []
    values: list[Tensor | None] = []
    for op in ops[:-1]:
        if isinstance(op, net.Convolution):
            window = (module.stride, module.padding, module.dilation, module.groups)
            value = functional.conv2d(found.x, module.weight, module.bias, *window)
        elif isinstance(op, net.Arithmetic):
            assert found.residual is not None
            value = value + found.residual
        else:
            value = _activated(act, value)
        values.append(value)
    return list(zip(ops, [*values, None], strict=True))


def _activated(act: Act, x: Tensor) -> Tensor:
    """The activation of every value, in double precision and rounded once."""
    row = ACTIVATIONS[act.name]
    with np.errstate(all="ignore"):
        values = row.forward(x.detach().double().cpu().numpy(), act.slope)
    return torch.from_numpy(np.asarray(values)).to(x)


def _windows(op: net.Op | None) -> Conv | Pool | None:
    if isinstance(op, net.Convolution):
        return op.conv
    return op.pool if isinstance(op, net.Pooling) else None
