"""One engine of the race, in a process of its own: what ``neocog.race`` starts and talks to.

    python -m neocog.contenders ENGINE NETWORK BATCH THREADS FOLDER

builds the network with fixed weights and then answers requests, one JSON object a line:

    {"do": "convert"}               writes the engine's own file of the network into FOLDER
    {"do": "reference"}             writes the float64 result of PyTorch eager into FOLDER
    {"do": "prepare"}               {"import_s", "prepare_s", "first_call_s"}
    {"do": "check"}                 {"error": max|out - reference| / max|reference|}
    {"do": "time", "seconds": s}    {"ms": median of the calls of about s seconds, "calls": n}
    {"do": "limit"}                 {"peak": multiply-adds per second, "multiply_adds": of a call};
                                    neocog-freeze only
    {"do": "memory"}                {"peak_mb", "steady_mb"} over the built network, {"winograd_mb"}

How it answers: see :mod:`neocog.answering`. Every engine is given the same float32 [N, C, H, W]
tensor (or a NumPy array on the same memory) at each call and returns logits [N, classes].
"""

from __future__ import annotations

import functools
import importlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .answering import (
    Mode,
    Run,
    answering,
    forget_peak,
    median_call,
    processor_peak,
    resident,
    serve,
)
from .architectures import ARCHITECTURES, randomise_batch_norms

SEED = 0


@dataclass(frozen=True)
class Task:
    """Who computes what."""

    engine: str
    network: str
    batch: int
    threads: int
    folder: Path

    def arguments(self) -> list[str]:
        """As :func:`main` reads them."""
        numbers = (self.batch, self.threads, self.folder)
        return [self.engine, self.network, *map(str, numbers)]

    def file(self, suffix: str, batch: int | None = None) -> Path:
        """The network converted for a batch (by default this task's), the same for all threads."""
        return self.folder / f"{self.network}_{self.batch if batch is None else batch}{suffix}"


@dataclass(frozen=True)
class Engine:
    """How one engine computes a network.

    ``convert`` is done once for all children and is not part of the cold start; ``prepare``
    returns one call. ``includes`` says what the time of a call contains.
    """

    prepare: Callable[[Task, nn.Module, Tensor], Run]
    includes: str
    convert: Callable[[Task, nn.Module, Tensor], None] | None = None
    winograd: Callable[[Run], int] | None = None
    """Bytes of transformed weights, if it tells."""
    module: str = "torch"
    """What is imported before it prepares anything."""


# ------------------------------------------------------------------------------------- PyTorch


def _eager(task: Task, model: nn.Module, x: Tensor) -> Run:
    return lambda: model(x)


def _channels_last(task: Task, model: nn.Module, x: Tensor) -> Run:
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return lambda: model(x.contiguous(memory_format=torch.channels_last))


def _inductor(task: Task, model: nn.Module, x: Tensor) -> Run:
    compiled = torch.compile(model)
    return lambda: compiled(x)


def _inductor_frozen(task: Task, model: nn.Module, x: Tensor) -> Run:
    import torch._inductor.config

    torch._inductor.config.freezing = True
    return _inductor(task, model, x)


def _neocog_freeze(task: Task, model: nn.Module, x: Tensor) -> Run:
    from .freezing import freeze

    return functools.partial(freeze(model, x), x)


def _winograd_weights(run: Run) -> int:
    from .choices import WINOGRAD
    from .freezing import Frozen

    frozen = run.func if isinstance(run, functools.partial) else run
    assert isinstance(frozen, Frozen)
    packed = frozen.weights.packed
    return sum(w.nbytes for key, w in packed.items() if key.algorithm in WINOGRAD)


def _neocog_compile(task: Task, model: nn.Module, x: Tensor) -> Run:
    compiled = torch.compile(model, backend="neocog")
    return lambda: compiled(x)


# --------------------------------------------------------------------------------- other houses


def _to_onnx(task: Task, model: nn.Module, x: Tensor) -> None:
    # The tracing exporter: its graphs are the plainer ones (GlobalAveragePool, not ReduceMean).
    torch.onnx.export(model, (x,), task.file(".onnx"), dynamo=False)


def _onnx_runtime(task: Task, model: nn.Module, x: Tensor) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = task.threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        task.file(".onnx"), options, providers=["CPUExecutionProvider"]
    )
    given = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, given)[0]


def _to_openvino(task: Task, model: nn.Module, x: Tensor) -> None:
    import openvino

    graph = openvino.convert_model(model, example_input=x, input=[list(x.shape)])
    openvino.save_model(graph, task.file(".xml"), compress_to_fp16=False)


def _openvino(task: Task, model: nn.Module, x: Tensor) -> Run:
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": task.threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = openvino.compile_model(task.file(".xml"), "CPU", settings).create_infer_request()
    given = x.numpy()
    return lambda: request.infer([given], share_inputs=True)[0]


def _to_ncnn(task: Task, model: nn.Module, x: Tensor) -> None:
    import subprocess

    import pnnx

    traced = task.file(".pt", batch=1)
    torch.jit.trace(model, x[:1]).save(traced)
    # The tool itself: pnnx.export also writes and runs a Python file of the network, which fails
    # on modules whose names are numbers.
    shape = ",".join(map(str, (1, *x.shape[1:])))
    command = [pnnx.EXEC_PATH, str(traced), f"inputshape=[{shape}]f32", "fp16=0"]
    subprocess.run(command, cwd=task.folder, check=True, stdout=sys.stderr)


def _ncnn(task: Task, model: nn.Module, x: Tensor) -> Run:
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads = task.threads
    for half in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_storage"):
        setattr(net.opt, f"use_{half}", False)
    for load, suffix in ((net.load_param, ".ncnn.param"), (net.load_model, ".ncnn.bin")):
        if load(str(task.file(suffix, batch=1))) != 0:
            raise RuntimeError(f"ncnn cannot load {task.file(suffix, batch=1).name}")
    pictures = [ncnn.Mat(picture) for picture in x.numpy()]

    def run() -> np.ndarray:
        found = []
        for picture in pictures:
            extractor = net.create_extractor()
            extractor.input("in0", picture)
            found.append(np.array(extractor.extract("out0")[1]))
        return np.stack(found)

    return run


def _to_litert(task: Task, model: nn.Module, x: Tensor) -> None:
    import litert_torch

    litert_torch.convert(model, (x,)).export(str(task.file(".tflite")))


def _litert(task: Task, model: nn.Module, x: Tensor) -> Run:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(task.file(".tflite")), num_threads=task.threads)
    interpreter.allocate_tensors()
    (given,), (result,) = interpreter.get_input_details(), interpreter.get_output_details()
    pictures = x.numpy()

    def run() -> np.ndarray:
        interpreter.set_tensor(given["index"], pictures)
        interpreter.invoke()
        return interpreter.get_tensor(result["index"])

    return run


ENGINES: dict[str, Engine] = {
    "eager": Engine(_eager, "PyTorch's modules on the contiguous tensor"),
    "eager-channels-last": Engine(
        _channels_last, "weights in channels_last; the copy of the input into it is timed"
    ),
    "inductor": Engine(
        _inductor, "torch.compile with its guards", module="torch._inductor.compile_fx"
    ),
    "inductor-frozen": Engine(
        _inductor_frozen,
        "torch.compile with torch._inductor.config.freezing, with its guards",
        module="torch._inductor.compile_fx",
    ),
    "onnxruntime": Engine(
        _onnx_runtime,
        "session.run from a NumPy array to a new one",
        _to_onnx,
        module="onnxruntime",
    ),
    "openvino": Engine(
        _openvino,
        "infer on a shared input, the result copied out of the request",
        _to_openvino,
        module="openvino",
    ),
    "ncnn": Engine(
        _ncnn,
        "one extractor per picture, one after the other; results copied out",
        _to_ncnn,
        module="ncnn",
    ),
    "litert": Engine(
        _litert,
        "set_tensor, invoke, get_tensor: input and result are copied",
        _to_litert,
        module="ai_edge_litert.interpreter",
    ),
    "neocog-freeze": Engine(
        _neocog_freeze,
        "neocog.freeze(model, x), from tensor to new tensor",
        winograd=_winograd_weights,
        module="neocog.freezing",
    ),
    "neocog-compile": Engine(
        _neocog_compile,
        'torch.compile(backend="neocog") with its guards and checks of weights',
        module="neocog.backend",
    ),
}


# --------------------------------------------------------------------------------- the answers


class Contender:
    """Answers the requests for one task."""

    mode: Mode = torch.inference_mode

    def __init__(self, task: Task) -> None:
        torch.set_num_threads(task.threads)
        found = ARCHITECTURES[task.network]
        self.task = task
        self.engine = ENGINES[task.engine]
        torch.manual_seed(SEED)
        self.model = randomise_batch_norms(found.make(), SEED).eval()
        self.x = torch.randn(task.batch, *found.in_shape)
        self.base = 0
        self.run: Run = lambda: self.x

    def convert(self) -> dict[str, Any]:
        """Seconds it took to write the engine's own file."""
        start = time.perf_counter()
        if self.engine.convert is not None:
            self.engine.convert(self.task, self.model, self.x)
        return {"convert_s": time.perf_counter() - start}

    def reference(self) -> dict[str, Any]:
        """The float64 result, into the task's folder."""
        np.save(self.task.file(".npy"), self.model.double()(self.x.double()).numpy())
        return {}

    def prepare(self) -> dict[str, Any]:
        """Seconds of the import, until there is something to call, and of its first call."""
        self.base = resident("VmRSS")
        forget_peak()
        before = time.perf_counter()
        importlib.import_module(self.engine.module)
        start = time.perf_counter()
        self.run = self.engine.prepare(self.task, self.model, self.x)
        ready = time.perf_counter()
        self.run()
        done = time.perf_counter()
        found = {"import_s": start - before, "prepare_s": ready - start}
        return found | {"first_call_s": done - ready}

    def check(self) -> dict[str, Any]:
        """How far the result is from the reference."""
        expected = np.load(self.task.file(".npy"))
        out = np.asarray(self.run())
        if out.shape != expected.shape or out.dtype != np.float32:
            raise RuntimeError(
                f"returned {out.dtype} {out.shape}, expected float32 {expected.shape}"
            )
        if not np.isfinite(out).all():
            raise RuntimeError("returned NaN or infinities")
        return {"error": float(np.abs(out - expected).max() / np.abs(expected).max())}

    def time(self, seconds: float) -> dict[str, Any]:
        """The median call among those of about so many seconds, one at least."""
        return median_call(self.run, seconds)

    def limit(self) -> dict[str, Any]:
        """What the processor could do at most, and what one call asks of it by definition."""
        from .freezing import Frozen

        frozen = self.run.func if isinstance(self.run, functools.partial) else self.run
        assert isinstance(frozen, Frozen)
        made = frozen.plans[-1].rewritten
        assert made is not None, frozen.plans[-1].report
        asked = sum(node.multiply_adds for node in made.nodes)
        return {"peak": processor_peak(self.task.threads), "multiply_adds": asked}

    def memory(self) -> dict[str, Any]:
        """Growth of resident memory over the built network, at its peak and now."""
        peak, now = resident("VmHWM") - self.base, resident("VmRSS") - self.base
        found = {"peak_mb": 1e-6 * max(peak, 0), "steady_mb": 1e-6 * max(now, 0)}
        tell = self.engine.winograd
        return found | {"winograd_mb": None if tell is None else 1e-6 * tell(self.run)}


def main(arguments: Sequence[str] | None = None) -> None:
    """The process: see the module's docstring."""
    engine, network, batch, threads, folder = sys.argv[1:] if arguments is None else arguments
    task = Task(engine, network, int(batch), int(threads), Path(folder))
    with answering() as answers:
        serve(Contender(task), sys.stdin, answers)


if __name__ == "__main__":
    main()
