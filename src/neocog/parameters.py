"""Parameters as kernels read them: packed weights and vectors, made once or kept up to date.

A frozen model packs once. A live model promises nothing about its weights: :class:`Live` compares
a checksum of every tensor it has made something from with that of the last call, whatever has
changed it (optimisers, ``load_state_dict``, ``.data``, NumPy, a new tensor at an old address), and
packs again what is out of date.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import choices
from .convolutions import Weights
from .cpu import checksum, forks
from .kernels import kernel
from .network import Constants, Norm
from .problem import Conv
from .program import Program
from .stages import Packed, Vector
from .target import Target


@functools.lru_cache(512)
def _packing(
    conv: Conv, algorithm: str, strides: tuple[int, ...], target: Target
) -> tuple[Program, int]:
    p = Program(("w", "packed"))
    weights = Weights.of(p.buffer("w"), strides, conv)
    choices.pack(p, target, conv, algorithm, weights, p.buffer("packed"))
    taps = conv.rows.size * conv.cols.size
    p.work = conv.out_channels * conv.in_channels // conv.groups * taps
    return p, choices.packed_elements(target, conv, algorithm)


@dataclass
class Parameters:
    """Tensors by name, and what has been made from them."""

    tensors: Mapping[str, Tensor]
    target: Target
    packed: MutableMapping[Packed, Tensor] = field(default_factory=weakref.WeakValueDictionary)
    """Kept by the plans that use them: their order may depend on the size of the maps."""
    affine: dict[Norm | Constants, tuple[Tensor, Tensor]] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=forks.lock)
    """Two callers must not each make their own: a live model would update one of them."""

    def packed_for(self, key: Packed) -> Tensor:
        """The weights of a layer in the order of its kernel."""
        with self.lock:
            made = self.packed.get(key)
            if made is None:
                strides = self.tensors[key.weight].stride()
                size = _packing(key.conv, key.algorithm, strides, self.target)[1]
                made = torch.empty(size, dtype=torch.float32, device="cpu")
                self.pack(key, made)
                self.packed[key] = made
            return made

    def pack(self, key: Packed, packed: Tensor) -> None:
        """Fill the packed weights from the tensor."""
        weight = self.tensors[key.weight].detach()
        program, _ = _packing(key.conv, key.algorithm, weight.stride(), self.target)
        program.run(weight.data_ptr(), packed.data_ptr())

    def vector_for(self, key: Vector) -> Tensor:
        """A vector of parameters: itself, or the scale or shift of a batch norm."""
        if not isinstance(key.source, Norm | Constants):
            return self.tensors[str(key.source)].detach().contiguous()
        with self.lock:
            if key.source not in self.affine:
                self.affine[key.source] = self.affine_of(key.source)
            scale, shift = self.affine[key.source]
        return scale if key.part == "scale" else shift

    def affine_of(self, norm: Norm | Constants) -> tuple[Tensor, Tensor]:
        """scale = weight / sqrt(var + eps), shift = bias - mean * scale, computed in float64."""
        if isinstance(norm, Constants):
            scale, shift = (
                torch.full((norm.channels,), v, dtype=torch.float32, device="cpu")
                for v in (norm.scale, norm.shift)
            )
            return scale, shift
        get = self.tensors
        mean, var = get[norm.mean].detach().double(), get[norm.var].detach().double()
        weight = get[norm.weight].detach().double() if norm.weight else torch.ones_like(mean)
        bias = get[norm.bias].detach().double() if norm.bias else torch.zeros_like(mean)
        scale = weight / torch.sqrt(var + norm.eps)
        return scale.float(), (bias - mean * scale).float()


def _sources(norm: Norm | Constants) -> set[str]:
    if isinstance(norm, Constants):
        return set()
    return {norm.mean, norm.var} | {n for n in (norm.weight, norm.bias) if n is not None}


@dataclass(frozen=True)
class _Contents:
    """What tensors held at a call: checksums of their parts."""

    names: list[str]
    strides: list[tuple[int, ...]]
    """The same memory read with other strides holds other weights."""
    ends: list[int]
    """Where in ``sums`` those of each tensor end."""
    sums: NDArray[np.int64]

    def same(self, other: _Contents) -> bool:
        """Whether nothing has changed."""
        names = self.names == other.names and self.strides == other.strides
        return names and np.array_equal(self.sums, other.sums)

    def tensors(self) -> dict[str, tuple[tuple[int, ...], list[int]]]:
        """By name, what is the same where nothing has changed."""
        starts = [0, *self.ends]
        return {
            name: (strides, self.sums[start:end].tolist())
            for name, strides, start, end in zip(
                self.names, self.strides, starts, self.ends, strict=False
            )
        }


@dataclass
class Live(Parameters):
    """Parameters that may change between calls in any way."""

    _contents: _Contents | None = None
    _generation: int = field(default_factory=forks.generation)

    def refresh(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the tensors of this call; make anew what was made from other contents.

        Only those are kept that something has been made from: an input may be large.
        """
        with self.lock:
            if self._generation != forks.generation():  # another thread may have been packing
                self._contents, self._generation = None, forks.generation()
            packed = dict(self.packed.items())
            watched = {key.weight for key in packed}.union(*map(_sources, self.affine))
            own = {n: t for n, t in self.tensors.items() if n in watched or n not in tensors}
            self.tensors = own | {n: tensors[n] for n in watched & tensors.keys()}
            before, self._contents = self._contents, self._read(sorted(watched))
            if before is not None and self._contents.same(before):
                return
            old = {} if before is None else before.tensors()
            changed = {n for n, held in self._contents.tensors().items() if old.get(n) != held}
            # What was made for weights of another shape waits until such weights come again.
            for key, made in packed.items():
                fits = self.tensors[key.weight].shape == key.conv.weight_shape
                if key.weight in changed and fits:
                    self.pack(key, made)
            for norm, vectors in self.affine.items():
                if not changed & _sources(norm):
                    continue
                new = self.affine_of(norm)
                if new[0].shape == vectors[0].shape:
                    for vector, values in zip(vectors, new, strict=True):
                        vector.copy_(values)

    def _read(self, names: list[str]) -> _Contents:
        dense = [_dense(self.tensors[name]) for name in names]
        program, ends = _summing(tuple([t.numel() for t in dense]), self.target)
        sums = np.zeros(ends[-1] if ends else 0, dtype=np.int64)
        program.run(*[t.data_ptr() for t in dense], sums.ctypes.data)
        return _Contents(names, [t.stride() for t in dense], ends, sums)


def _dense(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where its elements do not fill one stretch of memory."""
    if tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor
    return tensor.detach().contiguous()


@functools.lru_cache(64)
def _summing(sizes: tuple[int, ...], target: Target) -> tuple[Program, list[int]]:
    """The program that sums tensors of these sizes, and where the sums of each end."""
    p = Program((*(f"x{i}" for i in range(len(sizes))), "out"))
    ends, first = [], 0
    for i, size in enumerate(sizes):
        items = -(-size // checksum.CHUNK)
        step = p.step(
            kernel(checksum.ChecksumPlan(target)), items,
            x=p.buffer(f"x{i}"), elements=size, out=p.buffer("out") + 2 * first,
        )  # fmt: skip
        step.alongside = True
        first += items
        ends.append(first)
    p.work = sum(sizes)
    return p, ends
