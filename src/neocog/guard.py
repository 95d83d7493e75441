"""The one guard before native code: what compiled kernels may read, and when they may run.

Kernels read raw memory. :func:`plain` says whether a tensor is just that: dense float or integer
memory of the CPU, read as it lies there. :func:`interrupted` says whether PyTorch is in a state in
which somebody has to see its operators (a transform, a mode, a tracer) or in which other operators
would run (autocast). What does not pass is computed by PyTorch.

All names of PyTorch's that are not public and that neocog decides by stand here; they are those of
PyTorch 2.13. Measured there: `plain` takes half as long as `torch.relu` of a few elements (0.47
against 0.95 microseconds), `interrupted` a fifth (0.2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._C import (
    _disabled_torch_dispatch_impl,
    _disabled_torch_function_impl,
    _dispatch_keys,
    _get_tracing_state,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._C._functorch import is_functorch_wrapped_tensor, peek_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_TYPES = frozenset({Tensor, nn.Parameter})


def _keys() -> frozenset[int]:
    """The dispatch keys of plain memory: of tensors with and without a history of gradients."""
    with torch.inference_mode():
        inference = torch.empty(0, device="cpu")
    with torch.inference_mode(False):
        normal = torch.empty(0, device="cpu")
    return frozenset(_dispatch_keys(t).raw_repr() for t in (normal, inference))


# Whoever is first to import neocog may do so inside a mode.
with torch._C._DisableTorchDispatch():
    _KEYS = _keys()


def plain(t: Tensor) -> bool:
    """Whether ``t`` is strided memory of the CPU that holds its values as they are.

    That is a Tensor, a Parameter or a buffer, or a subclass that asks for no say in PyTorch's
    functions; its data type is not looked at. A tensor without elements is plain. A tensor whose
    storage was given back (resized to 0) is not; a storage that was cut to less than the tensor
    needs is not recognised, for PyTorch reads behind its end, too.
    """
    return (
        # One number tells a plain tensor from wrappers of torch.func, sparse, quantized, nested and
        # meta tensors, from those with a negative or conjugate bit, and from subclasses that
        # dispatch in Python (fake tensors, DTensor).
        _dispatch_keys(t).raw_repr() in _KEYS
        and (type(t) in _TYPES or not _asked(type(t)))
        and (t.data_ptr() != 0 or t.numel() == 0)
    )


def sharing(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Which tensors share memory: for each, the place of the first one with its storage."""
    first: dict[int, int] = {}
    return tuple([first.setdefault(t.untyped_storage()._cdata, i) for i, t in enumerate(tensors)])


def _asked(kind: type[Tensor]) -> bool:
    """Whether a subclass wants to be asked about what is done with its tensors."""
    return (
        kind.__torch_function__ is not _disabled_torch_function_impl
        or kind.__torch_dispatch__ is not _disabled_torch_dispatch_impl
    )


def why_not(t: Tensor) -> str | None:
    """What keeps ``t`` from being :func:`plain`, in words; None if nothing does."""
    if plain(t):
        return None
    if is_functorch_wrapped_tensor(t):
        return "a transform of torch.func"
    if isinstance(t, FakeTensor):
        return "a fake tensor (it has a shape, and no values)"
    if t.device.type != "cpu":
        return f"device {t.device} (kernels exist for cpu)"
    if type(t) not in _TYPES and _asked(type(t)):
        return f"a tensor subclass ({type(t).__name__})"
    if t.layout != torch.strided:
        return f"layout {t.layout}"
    return next((reason for reason, holds in _ODD if holds(t)), f"a tensor of {_dispatch_keys(t)}")


_ODD = (
    ("a nested tensor", lambda t: t.is_nested),
    ("a quantized tensor", lambda t: t.is_quantized),
    ("a tensor of zeros without memory", torch._is_zerotensor),
    ("the negative bit (values are negated when they are read)", lambda t: t.is_neg()),
    ("the conjugate bit (values are conjugated when they are read)", lambda t: t.is_conj()),
    ("a functional tensor", torch._is_functional_tensor),
    ("a storage without memory (resized to 0)", lambda t: t.data_ptr() == 0),
)


def interrupted() -> str | None:
    """Why nothing may run natively in this thread now, in words; None if everything may.

    Reasons: autocast on the CPU, a transform of torch.func, forward-mode differentiation, a
    TorchDispatchMode, a TorchFunctionMode, tracing by torch.jit. The mode of ``torch.device(...)``
    and ``torch.set_default_device`` is none, for kernels say where their results are; nor are
    neocog's own (:func:`own_mode`).
    """
    if (
        _len_torch_function_stack() == 0
        and _len_torch_dispatch_stack() == 0
        and not _is_any_autocast_enabled()
        and peek_interpreter_stack() is None
        and _get_tracing_state() is None
        and forward_ad._current_level < 0
    ):
        return None
    return _interruption()


def _interruption() -> str | None:
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if transform := transformed():
        return transform
    if _get_tracing_state() is not None:
        return "torch.jit traces"
    if dispatch := _get_current_dispatch_mode_stack():
        return f"a dispatch mode ({type(dispatch[0]).__name__})"
    if functions := foreign_modes():
        return f"a function mode ({type(functions[0]).__name__})"
    return None


def transformed() -> str | None:
    """The part of :func:`interrupted` that holds while torch.compile traces, too."""
    if _inside_transform():
        return "a transform of torch.func"
    # Dynamo guards on this number: it traces again for tangents.
    return "forward-mode differentiation" if forward_ad._current_level >= 0 else None


# Dynamo asks once, while it traces, and guards on the stack of transforms by itself.
@torch.compiler.assume_constant_result
def _inside_transform() -> bool:
    return peek_interpreter_stack() is not None


def foreign_modes() -> list[object]:
    """The active function modes that may look at calls: neither ``torch.device``'s nor neocog's."""
    stack = _get_current_function_mode_stack()
    return [m for m in stack if not isinstance(m, DeviceContext) and not _is_ours(m)]


def own_mode() -> bool:
    """Whether one of neocog's own function modes is active: a model is captured or recorded.

    It follows neocog's layers, and wants the numbers that their kernels compute.
    """
    return any(map(_is_ours, _get_current_function_mode_stack()))


def _is_ours(mode: object) -> bool:
    package = __name__.partition(".")[0] + "."
    return any(kind.__module__.startswith(package) for kind in type(mode).__mro__)
