"""Which algorithm a layer gets, by trying all: ``tune=True``. What was fastest is kept on disk.

Estimates (:mod:`neocog.choices`) know neither this processor's caches nor its memory. Here each
layer is run by itself with every algorithm that covers it, by turns; the quickest run counts. A
choice is kept beside the machine code (:mod:`neocog.cpu.code_cache`), per layer, batch, number of
threads and processor, so that the next process measures nothing.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from . import choices
from .cpu import code_cache, winograd
from .cpu.code_cache import Entry
from .cpu.runtime import thread_count
from .network import Input, Layer, Network, Node, Norm
from .problem import Add, Affine, Bias, Block, Conv, Step
from .stages import Builder, Native
from .target import Target

ROUNDS = 5
"""Runs of each algorithm, after one that is not timed."""


class Tuner:
    """Chooses algorithms for layers of one target; see :data:`neocog.choices.Choice`."""

    def __init__(self, target: Target):
        self.target = target
        self._known: dict[tuple[Conv, tuple[Step, ...], int, int], str] = {}

    def __call__(self, conv: Conv, epilogue: tuple[Step, ...] = (), averaged: int = 0) -> str:
        """The fastest algorithm, measured now or before."""
        candidates = choices.candidates(conv, epilogue, averaged)
        if len(candidates) == 1:
            return candidates[0]
        key = (conv, epilogue, averaged, thread_count())
        if key not in self._known:
            self._known[key] = self._kept(key, candidates) or self._fastest(key, candidates)
        return self._known[key]

    def _kept(self, key, candidates: list[str]) -> str | None:
        name = self._file(key)
        entry = None if name is None else code_cache.load(name)
        return entry.name if entry is not None and entry.name in candidates else None

    def _fastest(self, key, candidates: list[str]) -> str:
        conv, epilogue, *_ = key
        runs = [_Run(self.target, conv, epilogue, name) for name in candidates]
        taken = {run.name: run.seconds() for run in runs}
        for _ in range(ROUNDS):
            for run in runs:
                taken[run.name] = min(taken[run.name], run.seconds())
        best = min(taken, key=lambda name: taken[name])
        name = self._file(key)
        if name is not None:
            code_cache.store(name, Entry(best, (), b""))
        return best

    def _file(self, key) -> str | None:
        conv, epilogue, averaged, threads = key
        coarse = averaged >= choices.AVERAGED
        about = (self.target, conv, epilogue, coarse, threads)
        return code_cache.key(winograd.emit, about, "which algorithm")


class _Run:
    """A layer by itself, computed by one algorithm on whatever numbers."""

    def __init__(self, target: Target, conv: Conv, epilogue: tuple[Step, ...], name: str):
        self.name = name
        native = _alone(target, Block(conv, epilogue), name)
        shapes = [node.shape for node in (*native.inputs, *native.outputs)]
        tensors = [_numbers(shape) for shape in shapes]
        for key in native.packed:
            tensors.append(_numbers((choices.packed_elements(target, key.conv, key.algorithm),)))
        tensors += [_numbers((conv.out_channels,)) for _ in native.vectors]
        self.program, self._tensors = native.program, tensors
        self.seconds()

    def seconds(self) -> float:
        """Of one run."""
        start = time.perf_counter()
        self.program.run(*(t.data_ptr() for t in self._tensors))
        return time.perf_counter() - start


def _alone(target: Target, block: Block, name: str) -> Native:
    """The program of one layer."""
    network = Network()
    x = network.add(Input("x"), (), block.in_shape)
    inputs: tuple[Node, ...] = (x,)
    if Add() in block.epilogue:
        inputs += (network.add(Input("residual"), (), block.conv_shape),)
    norm = Norm("mean", "var", None, None, 0.0) if Affine() in block.epilogue else None
    bias = "bias" if Bias() in block.epilogue else None
    layer = network.add(Layer(block, "w", bias, norm), inputs, block.out_shape)
    network.outputs.append(layer)
    return Builder([layer], network.uses(), target, lambda *_: name, 0).build()


def _numbers(shape: tuple[int, ...]) -> Tensor:
    made = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    return made.contiguous(memory_format=torch.channels_last) if made.dim() == 4 else made
