"""A model in the formats that programs exchange: ONNX, and torch.export's own.

torch.export traces the model (https://docs.pytorch.org/docs/stable/export.html), neocog's operators
are spelled out in PyTorch's, which every exporter knows, and torch.onnx translates the graph
(https://docs.pytorch.org/docs/stable/onnx.html). All of it stays in memory.
"""

from __future__ import annotations

import io
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import ops, plain_pools
from .errors import NotExported

KEY = "neocog"
EXTRA_FILE = f"{KEY}.json"
"""Under which a file says what it is."""

NEEDED = ("onnx", "onnxscript", "onnxruntime")
"""Packages for ONNX, those of the extra ``export``."""

INPUT, OUTPUT, BATCH = "input", "output", "batch"

TRACED = 2
"""The batch of the trace; torch.export takes 1 for a constant."""

ONNX_LIMIT = 2**31 - 2**24
"""Bytes of weights in an ONNX file: protobuf ends at 2 GiB, and the graph needs some of them."""


@dataclass(frozen=True)
class Made:
    """A file in memory, the function that runs it, and who does."""

    data: bytes
    run: Callable[[Tensor], Sequence[Tensor]]
    checked_in: str
    opset: int | None = None


def _with_nothing_saved(op: Any) -> Callable[..., tuple[Tensor, ...]]:
    """One of neocog's operators in PyTorch's own; without gradients nobody reads what it saves."""

    def spelled(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
        first, saved = ops.SPELLED_OUT[op](x, *args), len(op._schema.returns) - 1
        assert first is not None  # all of neocog's own can be said
        return first, *(x.new_empty(0) for _ in range(saved))

    return spelled


SPELLED_OUT = {
    **{op: _with_nothing_saved(op) for op in ops.SPELLED_OUT if op.namespace == KEY},
    **plain_pools.SPELLED_OUT,
}
"""neocog's operators in PyTorch's own, and pools that torch.onnx gives another meaning."""


def traced(network: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    """The graph of PyTorch's operators, its batch of any size."""
    shapes: Any = torch.export.ShapesCollection()  # it serves forward(x) and forward(*args) alike
    shapes[x] = {0: torch.export.Dim(BATCH)}
    try:
        with hushed():
            program = torch.export.export(network, (x,), dynamic_shapes=shapes)
            program = program.run_decompositions(SPELLED_OUT)
    except Exception as error:  # torch.export runs the model's code, and raises whatever it likes
        raise NotExported(f"torch.export cannot trace the model: {_reason(error)}") from error
    for node in program.graph.nodes:  # where the source lies on this machine is nobody's business
        node.meta.pop("stack_trace", None)
        node.meta.pop("from_node", None)
    return program


def as_onnx(
    program: torch.export.ExportedProgram, outputs: int, note: str, opset: int | None
) -> Made:
    """An ONNX file of so many outputs, with ``note`` in its metadata, in ONNX Runtime.

    Raises:
        NotExported: ONNX, its opset or ONNX Runtime lacks something, or it would be too large.
    """
    tensors = [*program.state_dict.values(), *program.constants.values()]
    weights = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
    if weights > ONNX_LIMIT:
        raise NotExported(
            f"the weights are {weights:,} bytes, an ONNX file holds {ONNX_LIMIT:,}; expected .pt2"
        )
    try:
        with hushed():
            made = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                input_names=[INPUT],
                output_names=output_names(outputs),
                dynamic_shapes=({0: BATCH},),
                opset_version=opset,
            )
            assert made is not None
            model = made.model_proto
    except Exception as error:
        raise NotExported(f"torch.onnx cannot translate the model: {_reason(error)}") from error
    got = {entry.domain: entry.version for entry in model.opset_import}
    foreign = sorted({f"{n.domain}::{n.op_type}" for n in model.graph.node if n.domain})
    if foreign:
        raise NotExported(f"the model needs operators beyond ONNX's own: {', '.join(foreign)}")
    if opset is not None and got[""] != opset:
        raise NotExported(f"opset {opset}: torch.onnx does not have it, it gives {got['']}")
    for node in model.graph.node:  # how torch.export came to it makes half of a small file
        node.ClearField("metadata_props")
    model.metadata_props.add(key=KEY, value=note)
    return _in_onnx_runtime(model.SerializeToString(), got[""])


def _in_onnx_runtime(data: bytes, opset: int) -> Made:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what it has to say comes as an exception
    name = f"ONNX Runtime {onnxruntime.__version__}"
    try:
        session = onnxruntime.InferenceSession(data, options, ["CPUExecutionProvider"])
    except Exception as error:
        raise NotExported(f"{name} cannot load the export: {said(error)}") from error

    def run(x: Tensor) -> list[Tensor]:
        return [torch.as_tensor(y) for y in session.run(None, {INPUT: x.numpy()})]

    return Made(data, run, name, opset)


def as_torch_export(
    program: torch.export.ExportedProgram, note: str, asked: Sequence[Tensor]
) -> Made:
    """A file for ``torch.export.load`` with ``note`` beside the graph, and what that gives back.

    Raises:
        NotExported: it cannot be saved, or answers otherwise after that to what is ``asked``.
    """
    buffer = io.BytesIO()
    try:
        with hushed():
            torch.export.save(program, buffer, extra_files={EXTRA_FILE: note})
            loaded = torch.export.load(io.BytesIO(buffer.getvalue())).module()
    except Exception as error:
        raise NotExported(f"torch.export cannot save the model: {_reason(error)}") from error
    saved = program.module()
    made = Made(buffer.getvalue(), lambda x: leaves(loaded(x)), f"torch {torch.__version__}")
    # the model's own kernels may round otherwise, but these two run the same operators
    if largest_error(made, asked, [leaves(saved(x)) for x in asked]) > 0:
        raise NotExported("torch.export.load gives back another network than was saved")
    return made


@contextmanager
def hushed() -> Iterator[None]:
    """Without what torch prints, logs and warns of on the way; what goes wrong is raised."""
    disabled, nowhere = logging.root.manager.disable, io.StringIO()
    with warnings.catch_warnings(), redirect_stdout(nowhere), redirect_stderr(nowhere):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)


def _reason(error: BaseException) -> str:
    """Why torch cannot export a model, in one line; its own messages run to pages."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error)
    if type(error).__name__ == "GuardOnDataDependentSymNode":
        return "its control flow depends on the values of tensors"
    if "specialized it to be a constant" in text:
        return f"it works for a batch of {TRACED} only, expected one for batches of any size"
    operator = re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", text)
    if operator is not None:
        return f"ONNX has no counterpart of {operator.group(1)}"
    return said(error)


def said(error: BaseException) -> str:
    """The first line of an error, with its type."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0].strip()}"


def largest_error(made: Made, asked: Sequence[Tensor], wanted: Sequence[Sequence[Tensor]]) -> float:
    """How far the answers are off, as a share of the largest; NotExported if they are no such."""
    largest = 0.0
    for x, expected in zip(asked, wanted, strict=True):
        try:
            got = made.run(x)
        except Exception as error:
            raise NotExported(
                f"{made.checked_in} fails on a batch of {len(x)}, unlike the model: {said(error)}"
            ) from error
        kinds, right = [[(tuple(y.shape), y.dtype) for y in ys] for ys in (got, expected)]
        if kinds != right:
            raise NotExported(f"{made.checked_in} gives {kinds}, the model {right}")
        for one, other in zip(got, expected, strict=True):
            largest = max(largest, _error(one.double(), other.double()))
    return largest


def _error(got: Tensor, expected: Tensor) -> float:
    """The largest difference as a share of the largest number expected."""
    if torch.equal(got, expected):
        return 0.0
    error = float((got - expected).abs().max() / expected.abs().max())
    return error if math.isfinite(error) else math.inf


def leaves(answers: Any) -> list[Any]:
    """The tensors of a model's answer, in the order of torch.export."""
    return pytree.tree_leaves(answers)


def output_names(count: int) -> list[str]:
    """What the outputs are called: ``output``, or ``output_0`` and so on."""
    return [OUTPUT] if count == 1 else [f"{OUTPUT}_{i}" for i in range(count)]
