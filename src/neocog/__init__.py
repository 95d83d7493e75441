"""neocog: convolution and pooling layers for PyTorch, compiled for each layer.

``neocog.nn`` and ``neocog.functional`` stand in for their torch namesakes; ``neocog.problem``,
``neocog.geometry`` and ``neocog.reference`` are the mathematics underneath.
``torch.compile(model, backend="neocog")`` compiles whole models, for training and for inference,
``neocog.freeze(model, example)`` for inference alone; ``neocog.report`` says what became of them,
``neocog.models`` holds networks, ``neocog.free_memory()`` gives back what is held between steps.
``neocog.explain(model, image)`` shows where each number in a network comes from, and
``neocog.export(model, path, in_shape)`` writes it for ONNX Runtime and for torch.export.
"""

import importlib
from importlib import metadata
from typing import Any

__version__ = metadata.version("neocog")

__all__ = [
    "explain", "export", "free_memory", "freeze", "functional", "geometry", "models", "nn",
    "problem", "reference", "report",
]  # fmt: skip

FUNCTIONS = {
    "explain": "web.page", "export": "exporting", "free_memory": "program",
    "freeze": "freezing", "report": "backend",
}  # fmt: skip
"""Functions offered here, and the module of each."""


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    # Importing torch takes a second or two: only who asks for a module pays for it.
    if name in FUNCTIONS:
        return getattr(importlib.import_module(f"{__name__}.{FUNCTIONS[name]}"), name)
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
